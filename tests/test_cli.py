import json
import subprocess
import sys
from pathlib import Path

import pytest

import coterie
from coterie.doctor import examine

COTERIE = str(Path(sys.executable).with_name("coterie"))


def run(*arguments, **options):
    return subprocess.run([COTERIE, *arguments], capture_output=True, text=True, timeout=120, **options)


def test_version_and_help_need_no_torch():
    assert run("--version").stdout == f"coterie {coterie.__version__}\n"
    code = "import sys, coterie.cli; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "quickstart" in run("--help").stdout


def test_an_unknown_command_or_option_exits_with_2():
    unknown = run("quickstrat")
    assert unknown.returncode == 2
    assert "quickstart" in unknown.stderr
    assert run("doctor", "--colour").returncode == 2


def test_doctor_says_what_works(monkeypatch):
    shown = run("doctor")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "kernels: reference" in shown.stdout
    findings = json.loads(run("doctor", "--json").stdout)
    assert findings["kernels"]["torch"] == "works"
    assert findings["versions"]["coterie"] == coterie.__version__


def test_doctor_finds_a_kernel_that_computes_wrong_numbers(monkeypatch):
    from coterie.kernels import grouped

    right = grouped._BACKENDS["torch"]
    monkeypatch.setitem(grouped._BACKENDS, "torch", lambda *a: right(*a) + 1)
    findings = examine()
    assert findings["kernels"]["torch"] == "gives wrong numbers"
    assert not findings["healthy"]


def test_doctor_says_in_one_line_why_there_is_no_native_kernel():
    import os

    done = run("doctor", "--json", env={**os.environ, "COTERIE_NATIVE_LIBRARY": "/nowhere.so"})
    found = json.loads(done.stdout)
    assert done.returncode == 0
    assert found["kernels"]["default"] == "torch"
    assert found["kernels"]["native kernel"].startswith("absent: /nowhere.so is missing")


def test_doctor_exits_with_1_when_the_environment_names_no_kernel():
    import os

    done = run("doctor", env={**os.environ, "COTERIE_KERNEL": "abacus"})
    assert done.returncode == 1
    assert "abacus" in done.stdout


def test_every_public_name_of_the_package_resolves():
    for name in coterie.__all__:
        assert getattr(coterie, name) is not None


def test_an_extra_lacks_what_the_extras_it_is_made_of_lack(monkeypatch):
    from coterie import doctor

    requirements = ["one ; extra == 'a'", "coterie[a]>=0 ; extra == 'b'", "torch>=2 ; extra == 'b'", "two"]
    monkeypatch.setattr(doctor, "requires", lambda package: requirements)
    assert doctor._extras() == {
        "a": "lacks one: pip install 'coterie[a]'",
        "b": "lacks one: pip install 'coterie[b]'",
    }


def test_a_missing_extra_is_one_line_and_a_missing_module_of_ours_is_not_hidden(monkeypatch, capsys):
    from coterie.cli import main

    def failing(error):
        def run(arguments):
            raise error

        return run

    module = sys.modules[main.__module__]
    missing = ModuleNotFoundError("streams need river; install it with: pip install 'coterie[stream]'")
    monkeypatch.setattr(module, "app", failing(missing))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"coterie: {missing}\n"
    monkeypatch.setattr(module, "app", failing(ModuleNotFoundError("No module named 'coterie.gone'")))
    with pytest.raises(ModuleNotFoundError, match=r"coterie\.gone"):
        main()


def test_what_the_system_refuses_is_one_line_and_exit_status_2(monkeypatch, capsys):
    from coterie.cli import main

    def run(error):
        def failing(arguments):
            raise error

        monkeypatch.setattr(sys.modules[main.__module__], "app", failing)
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr().err

    full = OSError(28, "No space left on device", "out/a")
    assert run(full) == (2, "coterie: out/a: No space left on device\n")
    taken = OSError(39, "Directory not empty", ".out.x/out", None, "out")
    assert run(taken) == (2, "coterie: out: Directory not empty\n")
    assert run(OSError("cannot write out")) == (2, "coterie: cannot write out\n")


def test_the_home_folder_is_known_where_the_shell_does_not_expand_it(monkeypatch):
    from coterie.cli.app import _home

    monkeypatch.setenv("HOME", "/home/ada")
    assert _home("--out=~/a b") == "--out=/home/ada/a b"
    assert _home("~/model") == "/home/ada/model"
    assert [_home(a) for a in ("a~/b", "--x=a=~/b", "-1", "--text")] == ["a~/b", "--x=a=~/b", "-1", "--text"]
