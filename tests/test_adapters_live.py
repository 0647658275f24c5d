"""Adapters over real server processes: the tokens, logits and gradients of peft, whoever is killed on the way."""

import json
import signal

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from swarm.errors import AdapterNotServed
from swarm.scripts.local_swarm import LocalSwarm, ServerSpec

NAMES = ("french", None, "legal")
GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tuned(tiny_llama_folder, tmp_path_factory):
    """The model of each name as peft runs it, and the folders of the adapters."""
    models, folders = {None: AutoModelForCausalLM.from_pretrained(tiny_llama_folder).eval()}, {}
    for seed, name in enumerate(filter(None, NAMES)):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
        models[name] = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama_folder), config).eval()
        folders[name] = tmp_path_factory.mktemp("adapters") / name
        models[name].save_pretrained(folders[name])
    return models, folders


@pytest.fixture(scope="module")
def swarm(tiny_llama_folder, tuned):
    """A server without adapters, and for each block two with both."""
    flags = tuple(part for name, folder in tuned[1].items() for part in ("--adapters", f"{name}={folder}"))
    layout = ["0:8", *(ServerSpec(blocks, flags) for blocks in ("0:8", "0:4", "4:8"))]
    with LocalSwarm(tiny_llama_folder, layout, flags=["--threads", "1", "--dtype", "float32"]) as swarm:
        yield swarm


@pytest.fixture
def model(connect):
    return connect()


def tokens(*shape, seed=0):
    return torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(seed))


def generated(tuned, ids, names, **options):
    rows = zip(ids, names, strict=True)
    return torch.cat(
        [
            tuned[0][name].generate(input_ids=row[None], attention_mask=torch.ones_like(row[None]), **options)
            for row, name in rows
        ]
    )


def logits(tuned, ids, names):
    return torch.cat([tuned[0][name](row[None]).logits for row, name in zip(ids, names, strict=True)])


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("num_beams", [1, 3])
def test_every_row_gets_the_tokens_of_its_adapter(model, tuned, num_beams):
    ids = tokens(3, 7)
    options = GREEDY | {"num_beams": num_beams}
    ours = model.generate(ids, attention_mask=torch.ones_like(ids), adapter_names=NAMES, deadline=30.0, **options)
    theirs = generated(tuned, ids, NAMES, **options)
    assert torch.equal(ours, theirs)
    assert not torch.equal(theirs, generated(tuned, ids, [None] * 3, **options))  # adapters that change something


def test_gradients_pass_through_the_adapters(model, tuned):
    ids = tokens(3, 7)
    ours = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=ours, labels=ids, adapter_names=NAMES).loss.backward()
    theirs = tuned[0][None].get_input_embeddings()(ids).detach().requires_grad_()
    losses = [
        tuned[0][name](inputs_embeds=row[None], labels=labels[None]).loss
        for row, labels, name in zip(theirs, ids, NAMES, strict=True)
    ]
    torch.stack(losses).mean().backward()
    assert (ours.grad - theirs.grad).norm() <= 1e-5 * theirs.grad.norm()


def test_an_adapter_that_nobody_has(model):
    with pytest.raises(AdapterNotServed, match="named 'german'; adapters that are there: 'french', 'legal'"):
        model.set_adapter("german")


def test_the_list_of_adapters(swarm, tiny_llama_folder, capfd):
    from swarm.scripts.main import main

    with pytest.raises(SystemExit):
        main(["adapters", str(tiny_llama_folder), "--initial-peers", *swarm.initial_peers, "--json"])
    listed = json.loads(capfd.readouterr().out)["adapters"]
    assert [(one["name"], one["kind"], one["blocks"], one["complete"]) for one in listed] == [
        ("french", "lora", "0:8", True),
        ("legal", "lora", "0:8", True),
    ]


@torch.no_grad()
def test_a_fail_over_keeps_the_adapters(model, tuned, swarm):
    """The last test: it kills a server."""
    ids = tokens(3, 9)
    with model.inference_session(max_length=20, adapter_names=NAMES) as session:
        first = model(ids[:, :6]).logits
        lost = session.chain[0].peer_id
        (victim,) = [server for server in swarm.servers if server.peer_id == lost]
        victim.process.send_signal(signal.SIGKILL)
        victim.process.wait()
        rest = model(ids[:, 6:]).logits
        assert [replacement.lost.peer_id for replacement in session.replacements] == [lost]
    assert_close(torch.cat([first, rest], dim=1), logits(tuned, ids, NAMES))
