"""Who knows our kinds of adapters: PEFT, once this library is imported; what is said where one of both is missing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from kinds import CONFIG, KINDS
from rooms import telling
from tiny_bases import model_of

import hf_kvcache as kv
from hf_kvcache import adapters
from hf_kvcache.adapters.files import read_config, written

peft = pytest.importorskip("peft")
TYPES = {"bases": "KV_LOWRANK", "heads": "RETAINING_HEAD", "decisions": "KV_DMC"}
CONFIGS = {"bases": "LowRankKVConfig", "heads": "RetainingHeadConfig", "decisions": "DMCConfig"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base model, and an adapter of every kind that says so."""
    root = tmp_path_factory.mktemp("registration")
    model_of().save_pretrained(root / "base")
    for kind, (save, *_) in KINDS.items():
        save(root / kind)
        config = json.loads((root / kind / CONFIG).read_text()) | {"base_model_name_or_path": str(root / "base")}
        (root / kind / CONFIG).write_text(json.dumps(config))
    return root


def run(*command):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    "imports", telling(["import hf_kvcache, peft", "import peft, hf_kvcache"], "import hf_kvcache, peft")
)
def test_importing_the_library_is_enough(folders, imports):
    code = (
        f"{imports}, sys\nfrom transformers import AutoModelForCausalLM\n"
        "for folder in sys.argv[2:]:\n"
        "    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "    print(type(peft.PeftModel.from_pretrained(model, folder).peft_config['default']).__name__)\n"
    )
    out = run("-c", code, folders / "base", *(folders / kind for kind in KINDS))
    assert out.split() == list(CONFIGS.values())


def test_configs_have_names_of_their_own():
    for kind, name in CONFIGS.items():
        config = getattr(adapters, name)()
        assert config.peft_type is peft.PeftType[TYPES[kind]]
        assert config.hf_kvcache_version == kv.__version__ and config.format_version == 1
        assert type(peft.get_peft_config({"peft_type": TYPES[kind]})) is type(config)
        assert type(peft.get_peft_config(config.to_dict())) is type(config)
    assert adapters.register() and adapters.register(), "twice is no more than once"


def test_without_this_library_everybody_says_what_to_install(folders):
    """A KeyError of the kind is all that PEFT and transformers say, so the kind says it."""
    out = run(Path(__file__).with_name("alone.py"), "hf_kvcache", folders / "base", *(folders / k for k in KINDS))
    said = json.loads(out.partition("ANSWER ")[2])
    assert len(said) == 5 * len(KINDS)
    for name, message in said.items():
        kind = TYPES[Path(name.partition(" ")[2]).name]
        assert message == f"KeyError: '{kind}: pip install hf_kvcache, then import hf_kvcache'", name


def test_without_peft_we_say_what_to_install(folders):
    out = run(Path(__file__).with_name("alone.py"), "peft", folders / "base", *(folders / k for k in KINDS))
    said = json.loads(out.partition("ANSWER ")[2])
    assert len(said) == 2 * len(KINDS)
    assert all(m.startswith('ImportError: adapters on a model need PEFT: pip install "peft') for m in said.values())


def test_a_broken_peft_breaks_nothing_else(tmp_path):
    (tmp_path / "peft.py").write_text("raise RuntimeError('half of it is missing')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nimport hf_kvcache as kv; print(kv.adapters.register())"
    assert run("-c", code).split() == ["False"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_advice_is_no_part_of_the_kind(folders, tmp_path, kind):
    """Files without it, of whoever wrote them, are read as well; files with other advice are not."""
    text = (folders / kind / CONFIG).read_text()
    assert json.loads(text)["peft_type"] == written(TYPES[kind])
    for file in (folders / kind).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / CONFIG).write_text(text.replace(written(TYPES[kind]), TYPES[kind]))
    assert read_config(tmp_path / CONFIG) == read_config(folders / kind / CONFIG)
    kv.attach(model_of(), tmp_path)
    peft.PeftModel.from_pretrained(model_of(), tmp_path)
    (tmp_path / CONFIG).write_text(text.replace("pip install hf_kvcache", "pip install evil"))
    with pytest.raises(adapters.AdapterError, match="what caches look for"):
        kv.attach(model_of(), tmp_path)
    with pytest.raises(KeyError, match="evil"):
        peft.PeftModel.from_pretrained(model_of(), tmp_path)


def test_attach_takes_what_the_hub_is_asked_with(folders):
    for kind in KINDS:
        model = model_of()
        kv.attach(model, folders, "mine", subfolder=kind)
        with pytest.raises(TypeError, match="revison"):
            kv.attach(model, folders, "other", subfolder=kind, revison="main")
        assert read_config(folders / kind / CONFIG)["peft_type"] == model.peft_config["mine"].peft_type.value
