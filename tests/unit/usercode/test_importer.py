# SPDX-License-Identifier: Apache-2.0
"""User code: which file an import finds, and the messages about errors."""

from __future__ import annotations

import importlib
import os
import py_compile
import subprocess
import sys
from pathlib import Path

import pytest

from edgekd import usercode
from edgekd.domain.recipe import EntryPoint
from edgekd.errors import RecipeError


@pytest.fixture(autouse=True)
def _restored_import_state():
    path, hooks, cwd = list(sys.path), list(sys.path_hooks), Path.cwd()
    yield
    usercode.forget_modules()
    sys.path[:], sys.path_hooks[:] = path, hooks
    assert Path.cwd() == cwd


def _call(folder, name="models.py:student", *arguments):
    entry = EntryPoint(*name.rsplit(":", 1))
    return usercode.call_user_code(usercode.load_function(folder, entry), entry, *arguments)


def _refusal(folder, name="models.py:student"):
    with pytest.raises(RecipeError) as caught:
        _call(folder, name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _write(folder, **files):
    for name, text in files.items():
        path = folder.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_a_neighbouring_module_is_imported_and_never_that_of_another_recipe(tmp_path):
    code = "import common\nfrom nets import layers\ndef student():\n    return common.NAME, layers.NAME\n"
    folders = [
        _write(tmp_path / name, models=code, common=f"NAME = '{name}'\n", nets__layers=f"NAME = '{name}/nets'\n") for name in ("a", "b")
    ]
    names = [_call(folder) for folder in (*folders, folders[0])]
    assert names == [("a", "a/nets"), ("b", "b/nets"), ("a", "a/nets")]
    assert str(folders[0]) in sys.path
    assert str(folders[1]) not in sys.path


def test_a_module_is_imported_once_while_it_is_unchanged(tmp_path):
    _write(tmp_path, models="import common\ndef student():\n    return common.STATE\n", common="STATE = []\n")
    assert _call(tmp_path) is _call(tmp_path)


def test_code_that_was_edited_is_imported_anew_in_the_same_process(tmp_path):
    _write(tmp_path, models="import common\ndef student():\n    return common.WIDTH\n", common="WIDTH = 1\n")
    assert _call(tmp_path) == 1
    _write(tmp_path, common="WIDTH = 2\n")
    assert _call(tmp_path) == 2


def test_a_new_file_can_be_imported(tmp_path):
    _write(tmp_path, models="def student():\n    import late\n    return late.N\n")
    assert "late" in _refusal(tmp_path)
    _write(tmp_path, late="N = 5\n")
    assert _call(tmp_path) == 5


def test_files_of_the_same_name_in_two_folders_of_a_recipe_are_kept_apart(tmp_path):
    code = "import parts\ndef student():\n    return parts.N\n"
    _write(tmp_path, a__models=code, a__parts="N = 1\n", b__models=code, b__parts="N = 2\n")
    assert [_call(tmp_path, f"{name}/models.py:student") for name in "aba"] == [1, 2, 1]


def test_an_entry_outside_the_recipes_folder_finds_modules_beside_it(tmp_path):
    _write(tmp_path, shared__models="import parts\ndef student():\n    raise ValueError(parts.N)\n", shared__parts="N = 'x'\n")
    (tmp_path / "recipe").mkdir()
    assert _refusal(tmp_path / "recipe", "../shared/models.py:student") == "../shared/models.py:3: student() raised ValueError: x"


def test_bytecode_is_neither_written_nor_used(tmp_path):
    path = _write(tmp_path, models="def student():\n    return 1\n") / "models.py"
    cached = Path(py_compile.compile(str(path), doraise=True))
    stat = path.stat()
    path.write_text("def student():\n    return 2\n")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the same size and time: Python itself would use the old bytecode
    assert _call(tmp_path) == 2
    cached.unlink()
    cached.parent.rmdir()
    _write(tmp_path, models="def student():\n    import common\n    return common.N\n", common="N = 3\n")
    assert _call(tmp_path) == 3
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["common.py", "models.py"]


def test_relative_paths_start_at_the_recipes_folder(tmp_path):
    (tmp_path / "note.txt").write_text("text")
    _write(
        tmp_path,
        models="from pathlib import Path\nTOP = Path('note.txt').read_text()\ndef student():\n    return TOP + Path('note.txt').read_text()\n",
    )
    assert _call(tmp_path) == "texttext"


def test_arguments_reach_the_function(tmp_path):
    _write(tmp_path, models="def add(a, b):\n    return a + b\n")
    assert _call(tmp_path, "models.py:add", 2, 3) == 5


def test_a_users_file_never_replaces_a_module_of_python(tmp_path):
    _write(tmp_path, models="def student():\n    return 1\n", colorsys="raise RuntimeError\n", onnxscript="raise RuntimeError\n")
    sys.modules.pop("colorsys", None)
    assert _call(tmp_path) == 1
    assert hasattr(importlib.import_module("colorsys"), "rgb_to_hsv")
    assert _refusal(tmp_path, "colorsys.py:student") == (
        "colorsys.py: has the name of the module 'colorsys' of Python or of an installed package; rename the file"
    )
    assert "rename the file" in _refusal(tmp_path, "onnxscript.py:student")


INVALID = {
    "raises": ("def student():\n    raise ValueError('no width')\n", "models.py:2: student() raised ValueError: no width"),
    "raises without a text": ("def student():\n    assert False\n", "models.py:2: student() raised AssertionError"),
    "raises many lines": ("def student():\n    raise ValueError('first\\nsecond')\n", "models.py:2: student() raised ValueError: first"),
    "exits": (
        "import sys\ndef student():\n    sys.exit(3)\n",
        "models.py:3: student() tried to end the process (SystemExit: 3); it must return",
    ),
    "raises a BaseException": (
        "class Stop(BaseException):\n    pass\ndef student():\n    raise Stop('x')\n",
        "models.py:4: student() raised Stop: x",
    ),
    "raises below a library": (
        "import json\ndef student():\n    return inner()\ndef inner():\n    return json.loads('{')\n",
        "models.py:5: student() raised JSONDecodeError: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
    ),
    "raises while it is imported": ("x = 1\n1 / 0\n", "models.py:2: importing it raised ZeroDivisionError: division by zero"),
    "exits while it is imported": ("raise SystemExit\n", "models.py:1: importing it tried to end the process (SystemExit); it must return"),
    "lacks a module": (
        "import no_such\n",
        (
            "models.py:1: importing it raised ModuleNotFoundError: No module named 'no_such'; install 'no_such' where edgekd is installed, "
            "or correct the name"
        ),
    ),
    "lacks a name": (
        "from pathlib import Pth\n",
        f"models.py:1: importing it raised ImportError: cannot import name 'Pth' from 'pathlib' ({__import__('pathlib').__file__})",
    ),
    "is not valid Python": ("x = 1\ndef student(:\n", "models.py:2: is not valid Python (invalid syntax)"),
    "takes arguments": (
        "def student(width):\n    return width\n",
        "models.py: student() raised TypeError: student() missing 1 required positional argument: 'width'",
    ),
    "has another function": (
        "import json\nfrom pathlib import Path\ndef students():\n    pass\ndef _student():\n    pass\nclass Net:\n    pass\n",
        "models.py: has no function 'student'; expected one of Net, students (did you mean 'students'?)",
    ),
    "has no function": ("student_width = 3\n", "models.py: has no function 'student'; it defines none"),
    "has a value": (
        "student = 3\ndef teacher():\n    pass\n",
        "models.py: 'student' is an int; expected a function; expected one of teacher",
    ),
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_file(name, tmp_path):
    code, message = INVALID[name]
    assert _refusal(_write(tmp_path, models=code)) == message


def test_an_error_in_another_module_is_located_there(tmp_path):
    _write(tmp_path, models="import nets.parts\ndef student():\n    return 1\n", nets__parts="\n\nraise ValueError('x')\n")
    assert _refusal(tmp_path) == "nets/parts.py:3: importing it raised ValueError: x"
    _write(tmp_path, nets__parts="def (\n")
    assert _refusal(tmp_path) == "nets/parts.py:1: is not valid Python (invalid syntax)"


def test_an_absent_file_is_reported_with_the_existing_ones(tmp_path):
    _write(tmp_path, models="", data="")
    (tmp_path / "notes.txt").write_text("")
    assert _refusal(tmp_path, "model.py:student").endswith("expected one of data.py, models.py (did you mean 'models.py'?)")
    assert _refusal(tmp_path, "gone/model.py:student").endswith("; the folder has no Python file")
    assert _refusal(tmp_path, "notes.txt:student") == "notes.txt: is not a Python file; expected file.py:student"


def test_an_interrupt_and_edgekd_errors_pass_unchanged(tmp_path):
    _write(tmp_path, models="def stop():\n    raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        _call(tmp_path, "models.py:stop")

    def refuse():
        raise RecipeError("unchanged")

    with pytest.raises(RecipeError, match=r"^unchanged$"):
        usercode.call_user_code(refuse, EntryPoint("a.py", "b"))


def test_a_module_that_could_not_be_imported_is_removed(tmp_path):
    _write(tmp_path, models="import common\nWIDTH = common.WIDTH\ndef student():\n    return WIDTH\n", common="")
    assert "no attribute 'WIDTH'" in _refusal(tmp_path)
    assert "models" not in sys.modules
    _write(tmp_path, common="WIDTH = 4\n")
    assert _call(tmp_path) == 4


def test_a_call_can_be_described(tmp_path):
    _write(tmp_path, models="def student():\n    raise ValueError('x')\n")
    entry = EntryPoint("models.py", "student")
    with pytest.raises(RecipeError, match=r"^models\.py:2: reading sample 3 raised ValueError: x$"):
        usercode.call_user_code(usercode.load_function(tmp_path, entry), entry, what="reading sample 3")


def test_files_of_python_packages_and_edgekd_are_not_the_users(tmp_path):
    assert usercode.is_user_file(str(tmp_path / "models.py"))
    assert usercode.is_user_file("/usr/share/datasets/x.gz")
    libraries = [os.__file__, pytest.__file__, usercode.__file__, str(Path(pytest.__file__).parents[1]), "<string>"]
    assert not [path for path in libraries if usercode.is_user_file(path)]


LIBRARY = """
import logging, warnings
warnings.warn("a library's warning")
logging.getLogger("library").warning("a library's logged warning")
logging.getLogger("with_handler").addHandler(logging.StreamHandler())
logging.getLogger("with_handler").warning("a library's logged warning")
logging.getLogger("library").error("a library's error")
"""
USERS = """
import library, logging, warnings
print("printed", flush=True)
warnings.warn("careful")
logging.getLogger("users").warning("logged by a logger")
logging.warning("logged")
"""


def test_warnings_of_libraries_are_dropped_and_their_errors_and_all_of_the_users_are_shown(tmp_path):
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "library.py").write_text(LIBRARY)
    (tmp_path / "users.py").write_text(USERS)
    path = os.pathsep.join([str(tmp_path / "site-packages"), str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    program = f"import runpy; from edgekd import usercode; usercode.quieten_libraries(); runpy.run_path({str(tmp_path / 'users.py')!r})"
    environment = {**os.environ, "PYTHONPATH": path}
    process = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert process.stdout == "printed\n"
    shown = [line.removeprefix(f"{tmp_path}/") for line in process.stderr.splitlines()]
    assert shown == [
        "a library's error",
        "users.py:4: UserWarning: careful",
        '  warnings.warn("careful")',
        "logged by a logger",
        "WARNING:root:logged",
    ]
