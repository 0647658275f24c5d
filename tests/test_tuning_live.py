"""What a client trains, over real server processes: equal to the plain model, also when a server is killed."""

import pytest
import torch
from prompted import prompted_generate, prompted_logits
from transformers import AutoModelForCausalLM, LogitsProcessor

from swarm import AutoSwarmModelForCausalLM
from swarm.scripts.local_swarm import LocalSwarm

#: Three in a row, and one that can stand in for the second.
SERVERS = ["0:3", "3:6", "6:8", "2:7"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def plain(tiny_llama_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_llama_folder).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tiny_swarm(tiny_llama_folder):
    with LocalSwarm(tiny_llama_folder, SERVERS, flags=["--threads", "1", "--dtype", "float32"]) as swarm:
        yield swarm


@pytest.fixture
def load(tiny_swarm, tiny_llama_folder):
    models = []

    def load(servers=(0, 1, 2, 3)):
        """A model that may use only some of the servers."""
        peers = [tiny_swarm.servers[index].peer_id for index in servers]
        models.append(
            AutoSwarmModelForCausalLM.from_pretrained(
                tiny_llama_folder, initial_peers=tiny_swarm.initial_peers, allowed_servers=peers
            )
        )
        return models[-1]

    yield load
    for model in models:
        model.close()


def tokens(*shape, seed=0):
    return torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(seed))


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


def add_prompts(model):
    """Copies of the prompts that were added, for the plain model."""
    soft = model.add_soft_prompts(5, seed=1).detach().clone()
    return {"soft": soft, "deep": model.add_deep_prompts(std=0.3, seed=3).detach().clone()}


@pytest.mark.parametrize("servers", [(0, 1, 2), (0, 3, 2)], ids=["in a row", "used in part"])
def test_three_steps_of_training_equal_those_of_the_plain_model(load, plain, servers):
    model = load(servers)
    prompts = {name: values.requires_grad_() for name, values in add_prompts(model).items()}
    ours = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.01)
    theirs = torch.optim.SGD(prompts.values(), lr=0.01)
    for step in range(3):
        ids, mask = tokens(3, 9, seed=step), torch.ones(3, 9, dtype=torch.int64)
        mask[0, :4] = mask[1, 7:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[0, 4] = -100  # padding would have to predict it
        logits = prompted_logits(plain, ids, mask=mask, **prompts)
        losses = [
            model(ids, attention_mask=mask, labels=labels).loss,
            plain.loss_function(logits, labels=labels, vocab_size=256),
        ]
        assert_close(*losses)
        for optimizer, loss in zip((ours, theirs), losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
        if step == 0:  # later ones start from prompts that differ by rounding, which this model amplifies
            for name, values in prompts.items():
                assert_close(model.get_parameter(f"model.prompts.{name}").grad, values.grad)
        ours.step(), theirs.step()
    for name, values in prompts.items():
        assert_close(model.get_parameter(f"model.prompts.{name}"), values)


def test_a_module_between_blocks_of_servers(load, plain):
    model = load((0, 1, 2))
    adapter = torch.nn.Linear(64, 64)
    model.insert_after(4, adapter)  # in the middle of a server's span
    ids = tokens(2, 7)
    model(ids, labels=ids).loss.backward()
    gradients = [value.grad.clone() for value in adapter.parameters()]
    adapter.zero_grad()
    hook = plain.model.layers[4].register_forward_hook(lambda module, args, output: adapter(output))
    try:
        plain(ids, labels=ids).loss.backward()
        expected = plain.generate(ids, max_new_tokens=8)
    finally:
        hook.remove()
    for gradient, value in zip(gradients, adapter.parameters(), strict=True):
        assert_close(gradient, value.grad)
    assert torch.equal(model.generate(ids, max_new_tokens=8), expected)


class KillAt(LogitsProcessor):
    """Kills a server while token number `token` is chosen."""

    def __init__(self, session, swarm, token):
        self.session, self.swarm, self.token = session, swarm, token

    def __call__(self, input_ids, scores):
        self.token -= 1
        if self.token == 0:
            self.swarm.by_peer_id(self.session.chain[1].peer_id).kill()
        return scores


def test_a_killed_server_does_not_change_prompted_tokens(load, plain, tiny_swarm):
    """The last test: the server stays dead. The module makes two sessions of one."""
    model = load()
    prompts = add_prompts(model)
    ids, mask = tokens(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    expected = prompted_generate(plain, ids, mask=mask, max_new_tokens=16, **prompts)
    model.insert_after(4, torch.nn.Identity())
    with model.inference_session(max_length=30, num_rows=2) as session:
        kill = KillAt(session, tiny_swarm, token=6)
        ours = model.generate(ids, attention_mask=mask, max_new_tokens=16, logits_processor=[kill])
        assert session.replacements, "the session lost nothing"
    assert torch.equal(ours, expected)
