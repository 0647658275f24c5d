"""Adapters of every kind and format over real server processes, which come and go while the servers serve.

Float32, so each row's tokens must be those that the same adapter gives alone in plain transformers: run by peft, or
written out (tests/fakes/dense_adapters.py) for our own format.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from dense_adapters import apply_forms
from made_forms import Maker
from transformers import AutoModelForCausalLM

from swarm.checkpoint import open_checkpoint
from swarm.errors import AdapterNotServed
from swarm.scripts.local_swarm import LocalSwarm, ServerSpec
from swarm.server.adapters.importing.own import write_own

LIMIT = 60.0  # seconds for what takes one or two, but the machine may be busy
NUM_TOKENS = 10
OWN = ("sparse", "houlsby", "pfeiffer", "biases", "norms", "everything")
PEFT = {
    "lora": lambda: peft.LoraConfig(
        r=3, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], use_rslora=True
    ),
    "dora": lambda: peft.LoraConfig(r=4, target_modules=["k_proj", "o_proj"], use_dora=True),
    "ia3": lambda: peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6),
}
NAMES = (*PEFT, *OWN, None)
FLAGS = ["--threads", "1", "--dtype", "float32", "--announce-period", "4"]

pytestmark = pytest.mark.usefixtures("one_thread")


class Tuned:
    """Adapters in files, and what each gives in plain transformers."""

    def __init__(self, model_folder: Path, shelf: Path):
        self.model_folder, self.shelf = model_folder, shelf
        self.plain: Any = self._load()
        self.fingerprint = open_checkpoint(str(model_folder)).fingerprint()
        self.forms = Maker(self.plain, strength=0.15).all()
        for name in OWN:
            self.write_own(shelf / name, name)
        for seed, name in enumerate(PEFT):
            self.write_peft(shelf / name, name, seed)
        self.twins = shelf.parent / "first twin", shelf.parent / "second twin"
        for folder, name in zip(self.twins, ("sparse", "houlsby"), strict=True):
            self.write_own(folder, name)

    def _load(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.model_folder).eval()

    def write_own(self, folder: Path, form: str) -> None:
        write_own(folder, self.forms[form], form.replace(" ", "-"), self.fingerprint)

    def write_peft(self, folder: Path, kind: str, seed: int) -> None:
        torch.manual_seed(seed)
        model = peft.get_peft_model(self._load(), PEFT[kind]())
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(folder)

    @torch.no_grad()
    def greedy(self, name: str | None, ids: torch.Tensor, num_tokens: int = NUM_TOKENS) -> torch.Tensor:
        """ids: [tokens]. Whole texts again and again, without a cache."""
        with contextlib.ExitStack() as stack:
            model = self.plain
            if name in PEFT:
                model = peft.PeftModel.from_pretrained(self._load(), self.shelf / str(name)).eval()
            elif name is not None:
                stack.enter_context(apply_forms(model, self.forms[name]))
            for _ in range(num_tokens):
                logits = model(input_ids=ids[None], attention_mask=torch.ones_like(ids[None])).logits
                ids = torch.cat([ids, logits[0, -1:].argmax(-1)])
        return ids


@pytest.fixture(scope="module")
def tuned(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    return Tuned(tiny_llama_folder, tmp_path_factory.mktemp("shelf"))


@pytest.fixture(scope="module")
def swarm(tiny_llama_folder: Path, tuned: Tuned) -> Iterator[LocalSwarm]:
    """For each block two servers with the whole shelf; and two with something of their own, of one name."""
    with pytest.MonkeyPatch.context() as patch:
        path = [str(Path(__file__).parent / "fakes"), *filter(None, [os.environ.get("PYTHONPATH")])]
        patch.setenv("PYTHONPATH", os.pathsep.join(path))
        servers = [ServerSpec(blocks, ("--adapters", str(tuned.shelf))) for blocks in ("0:5", "5:8", "0:8")]
        for blocks, folder in zip(("0:8", "0:5"), tuned.twins, strict=True):
            servers.append(ServerSpec(blocks, ("--adapters", f"twin={folder}")))
        with LocalSwarm(tiny_llama_folder, servers, flags=FLAGS, program=("scanning_server", "--")) as swarm:
            yield swarm


@pytest.fixture
def model(connect: Callable[..., Any]) -> Any:
    return connect(update_period=1.0)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(seed))


def generate(model: Any, ids: torch.Tensor, names: tuple[str | None, ...]) -> torch.Tensor:
    found: torch.Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        adapter_names=list(names),
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
    )
    return found


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def serves(model: Any, name: str) -> bool:
    try:
        model.set_adapter(name)
    except AdapterNotServed:
        return False
    model.set_adapter(None)
    return True


def test_rows_of_every_kind_in_one_batch_get_the_tokens_of_their_own_adapter(model: Any, tuned: Tuned) -> None:
    ids = tokens(len(NAMES), 9)
    ours = generate(model, ids, NAMES)
    expected = [tuned.greedy(name, row) for name, row in zip(NAMES, ids, strict=True)]
    for name, row, wanted in zip(NAMES, ours, expected, strict=True):
        assert torch.equal(row, wanted), name
    plain = [tuned.greedy(None, row) for row in ids]
    different = sum(not torch.equal(one, other) for one, other in zip(expected, plain, strict=True))
    assert different == len(NAMES) - 1, "adapters that change something"


def test_clients_of_different_adapters_at_the_same_time(model: Any, tuned: Tuned) -> None:
    """Their steps meet in batches on the servers."""
    from concurrent.futures import ThreadPoolExecutor

    ids = tokens(4, 7, seed=5)
    names = ("prefix", "ia3", "houlsby", None)
    with ThreadPoolExecutor(4) as pool:
        ours = list(pool.map(lambda name, row: generate(model, row[None], (name,))[0], names, ids))
    for name, row, mine in zip(names, ids, ours, strict=True):
        assert torch.equal(mine, tuned.greedy(name, row)), name


def test_an_adapter_put_into_the_shelf_is_found_and_one_taken_away_stays_for_those_who_have_it(
    model: Any, tuned: Tuned
) -> None:
    assert not serves(model, "late")
    staged = tuned.shelf.parent / "staged"
    tuned.write_own(staged, "scales")
    staged.rename(tuned.shelf / "late")
    wait_for(lambda: serves(model, "late"), "the new adapter was not found")
    (ids,) = tokens(1, 14)
    tuned.forms["late"] = tuned.forms["scales"]
    wanted = tuned.greedy("late", ids, 0)
    with model.inference_session(max_length=32, adapter_names=["late"]), torch.no_grad():
        first = model(ids[None, :6]).logits
        shutil.rmtree(tuned.shelf / "late")
        wait_for(lambda: not serves(model, "late"), "it is still offered")
        rest = model(ids[None, 6:]).logits
    with apply_forms(tuned.plain, tuned.forms["late"]), torch.no_grad():
        expected = tuned.plain(wanted[None]).logits
    torch.testing.assert_close(
        torch.cat([first, rest], dim=1), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
    )
    with pytest.raises(AdapterNotServed, match="late"):
        generate(model, ids[None], ("late",))
    assert torch.equal(generate(model, ids[None], ("sparse",))[0], tuned.greedy("sparse", ids)), "others are untouched"


def test_bad_files_in_the_shelf_harm_nobody(model: Any, tuned: Tuned, swarm: LocalSwarm, tmp_path: Path) -> None:
    bad = "pickled", "foreign", "strange"
    pickled, foreign, strange, newcomer = (tmp_path / name for name in (*bad, "newcomer"))
    shutil.copytree(tuned.shelf / "lora", pickled)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    write_own(foreign, tuned.forms["biases"], "biases", "ab" * 32)
    shutil.copytree(tuned.shelf / "ia3", strange)
    config = (strange / "adapter_config.json").read_text().replace('"IA3"', '"OFT"')
    (strange / "adapter_config.json").write_text(config)
    tuned.write_own(newcomer, "scales")
    logs = [server._log for server in swarm.servers[:3]]  # of the shelf
    try:
        for folder in (pickled, foreign, strange):
            folder.rename(tuned.shelf / folder.name)
        for text in ("pickled: .*pickle", "strange: .*OFT", "foreign: .*was made for the weights abab"):
            pattern = f"left out adapter {text}"
            wait_for(lambda pattern=pattern: all(re.search(pattern, log.read_text()) for log in logs), text)
        newcomer.rename(tuned.shelf / newcomer.name)  # once it is found, the shelf was looked through again
        wait_for(lambda: serves(model, "newcomer"), "the new adapter was not found")
        assert not any(serves(model, name) for name in bad)
        for log in logs:
            assert all(log.read_text().count(f"left out adapter {name}:") == 1 for name in bad), log.read_text()
        (ids,) = tokens(1, 8, seed=3)
        assert torch.equal(generate(model, ids[None], ("prefix",))[0], tuned.greedy("prefix", ids))
    finally:
        for name in (*bad, "newcomer"):
            shutil.rmtree(tuned.shelf / name, ignore_errors=True)


def test_one_name_for_different_contents_on_different_servers(
    swarm: LocalSwarm, connect: Callable[..., Any], tuned: Tuned
) -> None:
    """No chain is made of both: those that are complete count."""
    model = connect(update_period=1.0)
    (ids,) = tokens(1, 8, seed=4)
    wait_for(lambda: serves(model, "twin"), "it is not announced")
    assert torch.equal(generate(model, ids[None], ("twin",))[0], tuned.greedy("sparse", ids))
    with model.inference_session(max_length=16, adapter_names=["twin"]) as session, torch.no_grad():
        model(ids[None])
        assert [link.peer_id for link in session.chain] == [swarm.servers[3].peer_id]
    swarm.servers[3].terminate()
    wait_for(lambda: not serves(model, "twin"), "half of the model is not enough")


def test_a_killed_server_changes_no_token(swarm: LocalSwarm, connect: Callable[..., Any], tuned: Tuned) -> None:
    """The last test: it kills a server. Its rows go on behind their prefix elsewhere."""
    model = connect(update_period=1.0)
    names = ("prefix", "everything", None, "dora")
    ids = tokens(4, 12, seed=6)
    with model.inference_session(max_length=40, num_rows=4, adapter_names=list(names)) as session:
        with torch.no_grad():
            model(ids[:, :7])
        lost = session.chain[0].peer_id
        swarm.by_peer_id(lost).process.send_signal(signal.SIGKILL)
        swarm.by_peer_id(lost).process.wait()
        ours = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False)
        assert [replacement.lost.peer_id for replacement in session.replacements] == [lost]
    for name, row, mine in zip(names, ids, ours, strict=True):
        assert torch.equal(mine, tuned.greedy(name, row)), name
