"""The shape of the code: who may import whom, what importing costs, and how large a file may be.

The rules are functions from a folder to a list of complaints, so each is tried on a tree that
breaks it as well as on nuner_jax itself.
"""

import ast
import fnmatch
import importlib.metadata
import pathlib
import re
import sys

import pytest
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nuner_jax"

# Every module of nuner_jax, top layer first. A module may import from its own layer and from those
# below it. To add a module, put its name (its path with dots, without "nuner_jax.") in the lowest
# layer in which it passes; if that feels wrong, it is two modules.
LAYERS = {
    "commands": {
        "annotate.__main__",
        "annotate.beam.__main__",
        "aot.__main__",
        "benchmark",
        "benchmark.__main__",
        "benchmark.measure",
        "benchmark.table",
        "data.build",
        "data.export_rows",
        "data.tokenizer",
        "evaluate",
        "export",
        "fewshot.__main__",
        "train",
    },
    "loop": {
        "aot.compile",
        "aot.compiled_step",
        "aot.sizing",
        "aot.table",
        "initialise",
        "program",
        "steps",
    },
    "tasks": {
        "tasks",
        "tasks.batches",
        "tasks.closed_set",
        "tasks.corpora",
        "tasks.frozen_half",
        "tasks.pretrain",
        "tasks.protocol",
        "tasks.retrieval",
        "tasks.tagged_split",
        "tasks.tagging",
        "tasks.text_tower",
    },
    "parts": {
        "annotate",
        "annotate.alignment",
        "annotate.beam",
        "annotate.beam.align",
        "annotate.beam.files",
        "annotate.beam.runner",
        "annotate.beam.select",
        "annotate.journal",
        "annotate.journal.file",
        "annotate.journal.journal",
        "annotate.journal.rows",
        "annotate.journal.writer",
        "annotate.money",
        "annotate.pipeline",
        "annotate.plan",
        "annotate.prompts",
        "annotate.report",
        "annotate.report.accounts",
        "annotate.report.card",
        "annotate.report.figures",
        "annotate.report.page",
        "annotate.request",
        "annotate.request.answers",
        "annotate.request.ask",
        "annotate.request.batch",
        "annotate.request.batch_endpoint",
        "annotate.request.batch_results",
        "annotate.request.endpoints",
        "annotate.request.live",
        "annotate.request.retry",
        "annotate.request.stop",
        "annotate.request.throttle",
        "annotate.request.work",
        "annotate.selection",
        "annotate.selection.duplicates",
        "annotate.selection.filters",
        "annotate.selection.select",
        "annotate.selection.sources",
        "annotate.units",
        "annotate.workdir",
        "checkpoint",
        "data",
        "data.align",
        "data.builder",
        "data.classes",
        "data.completions",
        "data.concepts",
        "data.corpus",
        "data.importers",
        "data.importers.conll",
        "data.importers.formats",
        "data.importers.hub",
        "data.importers.report",
        "data.importers.rows",
        "data.importers.stream",
        "data.importers.tfds_rows",
        "data.loader",
        "data.ner",
        "data.ner.datasets",
        "data.ner.named_sets",
        "data.ner.set_report",
        "data.ner.set_spec",
        "data.ner.tagged_files",
        "data.ner.words",
        "data.packed_rows",
        "data.packing",
        "data.prefetch",
        "data.ragged",
        "data.records",
        "data.tagged",
        "data.tfds_records",
        "data.tokens",
        "fewshot",
        "fewshot.features",
        "fewshot.figures",
        "fewshot.frozen",
        "fewshot.heads",
        "fewshot.llm",
        "fewshot.llm.answers",
        "fewshot.llm.baseline",
        "fewshot.llm.prompt",
        "fewshot.material",
        "fewshot.outcome",
        "fewshot.page",
        "fewshot.plan",
        "fewshot.report",
        "fewshot.results",
        "fewshot.run",
        "fewshot.sampling",
        "fewshot.scoring",
        "fewshot.starts",
        "fewshot.tables",
        "fewshot.transfer",
        "losses",
        "models",
        "models.attention",
        "models.encoder",
        "models.encoder_config",
        "models.gradients",
        "models.hf_weights",
        "models.params",
        "models.tagger",
        "models.towers",
        "performance.costs",
        "pretrained",
        "state",
        "text_encoder",
    },
    "leaves": {
        "aot",
        "aot.topology",
        "command",
        "config",
        "config.annotate_schema",
        "config.fewshot_schema",
        "config.files",
        "config.finetune_schema",
        "config.llm_schema",
        "config.pretrain_classes_schema",
        "config.pretrain_schema",
        "config.values",
        "decoding",
        "distributed",
        "distributed.cluster",
        "distributed.preemption",
        "distributed.roll_call",
        "errors",
        "folders",
        "metrics",
        "optim",
        "performance",
        "performance.device_rates",
        "performance.hlo",
        "progress",
        "sharding",
        "webpage",
        "workdir",
        "writers",
    },
}

# Third-party packages that only these modules may import.
ONLY_IMPORTER = {"orbax": "checkpoint"}
# Never imported, not even inside a function.
FORBIDDEN = {"tensorflow", "torch", "clu"}
# Slow to import, so only inside the functions that need them; the exceptions subclass theirs.
LAZY = {"huggingface_hub", "matplotlib", "pyarrow", "tensorflow_datasets", "transformers"}
# Of extras, and so not always there.
LAZY |= {"apache_beam", "datasets", "datasketch", "httpx2", "inflect", "openai", "sentencex"}
EAGER_EXCEPTIONS = {("data.tfds_records", "tensorflow_datasets")}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
TOP_LEVEL = {"nuner_jax", "configs", "launch", "tests"} | {
    "setup.py",
    "README.md",
    "LICENSE",
    "CITATION.cff",
}
# In setup.py although nuner_jax never imports them.
INDIRECT = {"array-record": "TFDS imports it to read and write shards, and requires it on Linux only"}


# --- Reading the tree --------------------------------------------------------------------------


def module_files(package: pathlib.Path) -> dict[str, pathlib.Path]:
    """Dotted module name, without the package's own (the package itself is ""), to its file."""
    files = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def parse(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_names(tree: ast.AST) -> list[str]:
    """Full dotted names of everything imported anywhere in it; `from a import b` gives "a.b"."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def import_graph(package: pathlib.Path) -> dict[str, set[str]]:
    """Each module's imports from its own package, those inside functions included."""
    files = module_files(package)
    graph = {}
    for module, path in files.items():
        graph[module] = set()
        for name in imported_names(parse(path)):
            top, _, inner = name.partition(".")
            if top != package.name:
                continue
            while inner and inner not in files:  # a name inside a module, not a module
                inner = inner.rpartition(".")[0]
            graph[module].add(inner)
    return graph


# --- The rules ---------------------------------------------------------------------------------


def layer_complaints(graph: dict[str, set[str]], layers: dict[str, set[str]]) -> list[str]:
    """Modules outside the table, entries without a module, and imports that point upwards."""
    rank = {module: i for i, modules in enumerate(layers.values()) for module in modules}
    rank[""] = len(layers)  # the package itself lies under everything
    names = [*layers, "the package itself"]
    complaints = [f"{m}: in no layer; add it to LAYERS" for m in sorted(graph.keys() - rank.keys())]
    complaints += [f"{m}: no such module; take it out of LAYERS" for m in sorted(rank - graph.keys())]
    for module, targets in graph.items():
        for target in sorted(targets):
            if rank.get(target, 99) < rank.get(module, 0):
                complaints.append(
                    f"{module} ({names[rank[module]]}) imports {target} ({names[rank[target]]}):"
                    " imports point down only"
                )
    return complaints


def cycle_complaints(graph: dict[str, set[str]]) -> list[str]:
    """The first cycle found, as a path; imports inside functions count."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [" -> ".join([*path[path.index(module) :], module])]
        if module in done:
            return []
        for target in sorted(graph.get(module, ())):
            if found := visit(target, [*path, module]):
                return found
        done.add(module)
        return []

    for module in sorted(graph):
        if found := visit(module, []):
            return found
    return []


def package_complaints(package: pathlib.Path) -> list[str]:
    """Third-party imports that are forbidden, reserved for one module, or due inside a function."""
    complaints = []
    for module, path in module_files(package).items():
        tree = parse(path)
        for top in sorted({name.partition(".")[0] for name in imported_names(tree)}):
            if top in FORBIDDEN:
                complaints.append(f"{module}: must not import {top}")
            if module != ONLY_IMPORTER.get(top, module):
                complaints.append(f"{module}: only {ONLY_IMPORTER[top]} may import {top}")
        eager = ast.Module([n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], [])
        for top in sorted({name.partition(".")[0] for name in imported_names(eager)} & LAZY):
            if (module, top) not in EAGER_EXCEPTIONS:
                complaints.append(f"{module}: import {top} inside the functions that need it")
    return complaints


def size_complaints(package: pathlib.Path) -> list[str]:
    """Files and functions that are asking to be split by meaning, and files that have none."""
    complaints = []
    for module, path in module_files(package).items():
        if re.fullmatch(r"_?utils?|helpers?|misc", path.stem):
            complaints.append(f"{module}: a name without a meaning; say what it holds")
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE_LINES:
            complaints.append(f"{module}: {lines} lines, more than {MAX_FILE_LINES}")
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    complaints.append(f"{module}.{node.name}: {lines} lines, more than {MAX_FUNCTION_LINES}")
    return complaints


def top_level_complaints(root: pathlib.Path) -> list[str]:
    """Entries of the root that are neither allowed, nor dotfiles, nor ignored by .gitignore."""
    ignored = [
        line.strip("/")
        for line in (root / ".gitignore").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    return [
        f"{path.name}: not allowed at the top level"
        for path in sorted(root.iterdir())
        if path.name not in TOP_LEVEL
        and not path.name.startswith(".")
        and not any(fnmatch.fnmatch(path.name, pattern) for pattern in ignored)
    ]


# --- nuner_jax keeps them ----------------------------------------------------------------------


def report(complaints: list[str]) -> str:
    return "\n" + "\n".join(complaints)


def test_imports_point_down_the_layers():
    complaints = layer_complaints(import_graph(PACKAGE), LAYERS)
    assert not complaints, report(complaints)


def test_imports_have_no_cycle():
    assert not cycle_complaints(import_graph(PACKAGE))


def test_third_party_imports_stay_in_their_place():
    complaints = package_complaints(PACKAGE)
    assert not complaints, report(complaints)


def test_files_and_functions_stay_small():
    complaints = size_complaints(PACKAGE)
    assert not complaints, report(complaints)


def test_top_level_holds_only_what_belongs_there():
    complaints = top_level_complaints(ROOT)
    assert not complaints, report(complaints)


# --- and a tree that breaks them is told so ----------------------------------------------------


@pytest.fixture
def fake_package(tmp_path):
    """Writes a package called nuner_jax from file name → source; gives its folder."""

    def write(**sources: str) -> pathlib.Path:
        package = tmp_path / "nuner_jax"
        for name, source in {"__init__": "", **sources}.items():
            path = package / (name.replace("__in__", "/") + ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        return package

    return write


def test_an_upward_import_is_found_even_inside_a_function(fake_package):
    package = fake_package(
        low="def f():\n    from nuner_jax.pack import high\n",
        pack__in____init__="",
        pack__in__high="import nuner_jax\nfrom nuner_jax.low import f\n",
    )
    layers = {"top": {"pack.high"}, "bottom": {"low", "pack"}}
    assert layer_complaints(import_graph(package), layers) == [
        "low (bottom) imports pack.high (top): imports point down only"
    ]


def test_the_table_must_list_every_module_and_no_other(fake_package):
    complaints = layer_complaints(import_graph(fake_package(new="")), {"only": {"gone"}})
    assert complaints == [
        "new: in no layer; add it to LAYERS",
        "gone: no such module; take it out of LAYERS",
    ]


def test_a_cycle_is_found(fake_package):
    package = fake_package(
        a="import nuner_jax.b\n",
        b="from nuner_jax.c import x\n",
        c="def f():\n    from nuner_jax import b\n",
    )
    assert cycle_complaints(import_graph(package)) == ["b -> c -> b"]


def test_misplaced_packages_are_found(fake_package):
    package = fake_package(
        checkpoint="from orbax.checkpoint import v1\n",
        steps="def f():\n    import torch.nn\n    import orbax.checkpoint\n",
        pretrained="import transformers\n\ndef f():\n    import matplotlib\n",
    )
    assert package_complaints(package) == [
        "pretrained: import transformers inside the functions that need it",
        "steps: only checkpoint may import orbax",
        "steps: must not import torch",
    ]


def test_large_and_nameless_files_are_found(fake_package):
    package = fake_package(
        utils="",
        fits="def f():\n" + "    x = 1\n" * 59,
        long="x = 1\n" * 401,
        wide="class C:\n    def f():\n" + "        x = 1\n" * 60,
    )
    assert size_complaints(package) == [
        "long: 401 lines, more than 400",
        "utils: a name without a meaning; say what it holds",
        "wide.f: 61 lines, more than 60",
    ]


def test_a_stray_file_at_the_top_level_is_found(tmp_path):
    (tmp_path / ".gitignore").write_text("# built\n/runs/\n*.egg-info/\n")
    for name in ("setup.py", "runs", "nuner_jax.egg-info", ".anything", "notes.txt"):
        (tmp_path / name).touch()
    assert top_level_complaints(tmp_path) == ["notes.txt: not allowed at the top level"]


# --- What importing does -----------------------------------------------------------------------

IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception as error:
        raise SystemExit(f"importing {name}: {error}")
    for package in ("tensorflow", "torch", "transformers", "matplotlib"):
        if package in sys.modules:
            raise SystemExit(f"importing {name} has loaded {package}")
"""
# Any use of a device starts a backend, and with this platform that raises.
NO_DEVICE = {"JAX_PLATFORMS": "no_such_platform"}


def test_importing_any_module_loads_no_heavy_package_and_touches_no_device(run_python):
    modules = [f"nuner_jax.{name}".rstrip(".") for name in module_files(PACKAGE)]
    done = run_python("-c", IMPORT_ALL, *modules, env=NO_DEVICE, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("import jax\nx = jax.numpy.zeros(3)\n", "importing bad: Unable to initialize backend"),
        ("import matplotlib\n", "importing bad has loaded matplotlib"),
    ],
)
def test_a_module_that_does_is_named(run_python, tmp_path, source, complaint):
    (tmp_path / "bad.py").write_text(source)
    environment = {**NO_DEVICE, "PYTHONPATH": str(tmp_path)}
    done = run_python("-c", IMPORT_ALL, "bad", env=environment, check=False)
    assert done.returncode == 1
    assert complaint in done.stderr


def test_importing_the_package_itself_is_instant(run_python):
    program = (
        "import sys, time; start = time.perf_counter(); import nuner_jax;"
        "print(time.perf_counter() - start, 'jax' in sys.modules, 'numpy' in sys.modules)"
    )
    runs = [run_python("-c", program).stdout.split() for _ in range(3)]
    assert all(loaded == ["False", "False"] for _, *loaded in runs)
    assert min(float(seconds) for seconds, *_ in runs) < 0.2


# --- What is installed -------------------------------------------------------------------------


def setup_literal(name: str):
    """A top-level literal of setup.py, read without running it."""
    for node in parse(ROOT / "setup.py").body:
        if isinstance(node, ast.Assign) and node.targets[0].id == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"setup.py assigns no {name}")


def normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def declared(requirements: list[str]) -> set[str]:
    return {normal(Requirement(line).name) for line in requirements}


def imported_distributions() -> dict[str, str]:
    """Distribution → one module that imports it, over nuner_jax and configs."""
    owners = importlib.metadata.packages_distributions()
    files = [*module_files(PACKAGE).values(), *sorted((ROOT / "configs").glob("*.py"))]
    found = {}
    for path in files:
        for top in {name.partition(".")[0] for name in imported_names(parse(path))}:
            if top in sys.stdlib_module_names or top in {"nuner_jax", "configs"}:
                continue
            found[normal(owners.get(top, [top])[0])] = str(path.relative_to(ROOT))
    return found


def test_setup_py_declares_what_is_imported_and_nothing_else():
    base = declared(setup_literal("REQUIREMENTS"))
    extras = {name for lines in setup_literal("EXTRAS").values() for name in declared(lines)}
    imported = imported_distributions()
    missing = {name: path for name, path in imported.items() if name not in base | extras}
    assert not missing, "imported, but not in setup.py"
    unused = base - imported.keys() - INDIRECT.keys()
    assert not unused, "in setup.py, but imported nowhere"


def test_installing_brings_no_tensorflow_and_no_torch():
    seen, waiting = set(), list(declared(setup_literal("REQUIREMENTS")))
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform or Python: a marker below kept it out
        for requirement in map(Requirement, lines):
            if not requirement.marker or requirement.marker.evaluate({"extra": ""}):
                waiting.append(normal(requirement.name))
    assert {"jax", "ml-dtypes"} <= seen  # the walk did go down
    assert not seen & {"tensorflow", "tensorflow-cpu", "torch", "keras", "clu"}
