"""``kbtrain launch``: variables, output, exit status, signals, restarts, several machines."""

import os
import signal
import socket
import sys

import pytest
from helpers_launch import is_running, launch, read_notes, started, wait_for, write_script
from pseudo_terminal import record

from kbtrain import cli
from kbtrain.cli.launch import environments
from kbtrain.distributed.environment import detect
from kbtrain.distributed.launch.rendezvous import Node
from kbtrain.utils.machine.ports import free_ports

pytestmark = pytest.mark.neutral

QUICK = (
    "from kbtrain.distributed.launch import local_processes\n"
    "local_processes.GRACE_SECONDS = local_processes.TERMINATION_SECONDS = 0.2\n"
)
NOTE_ENVIRONMENT = 'note(f"{rank}.json", json.dumps(dict(os.environ)))'


@pytest.mark.core
def test_each_process_gets_its_rank_and_the_same_addresses(tmp_path):
    script = write_script(tmp_path, NOTE_ENVIRONMENT)
    stale = {"TORCHELASTIC_RUN_ID": "x", "TF_CONFIG": "{", "KBTRAIN_JOINED_PID": "1", "RANK": "7"}
    assert launch("-n", 3, script, environ=stale) == (0, "", "")
    groups = [detect(environ) for environ in read_notes(tmp_path, "0.json", "1.json", "2.json")]
    assert [(group.rank, group.local_rank) for group in groups] == [(0, 0), (1, 1), (2, 2)]
    assert {(group.size, group.local_size, group.launcher) for group in groups} == {
        (3, 3, "kbtrain launch")
    }
    assert len({(group.address, group.port, group.addresses) for group in groups}) == 1
    ports = [groups[0].port, *(int(a.rpartition(":")[2]) for a in groups[0].addresses)]
    assert ports == [ports[0], *range(ports[0] + 1, ports[0] + 4)]


def test_variables_of_two_machines():
    nodes = [Node("a", 2), Node("fd00::2", 1)]
    (second,) = environments({"OMP_NUM_THREADS": "5", "HOME": "/h"}, nodes, 1, 100)
    assert second == {
        **{"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "1"},
        **{"MASTER_ADDR": "a", "MASTER_PORT": "100", "OMP_NUM_THREADS": "5", "HOME": "/h"},
        "KBTRAIN_ADDRESSES": "a:101,a:102,[fd00::2]:103",
        "KBTRAIN_LAUNCHER_PID": str(os.getpid()),
    }
    first = environments({}, nodes, 0, 100)
    assert [environ["RANK"] for environ in first] == ["0", "1"]
    assert 1 <= int(first[0]["OMP_NUM_THREADS"]) <= os.cpu_count()
    assert detect(first[1]).addresses == detect(second).addresses


def test_the_first_process_has_the_terminal_and_the_others_a_prefix(tmp_path):
    script = write_script(
        tmp_path,
        """
        sys.stdout.write(f"out {sys.stdin.read()} {sys.argv[1:]}\\n")
        sys.stdout.flush()
        sys.stderr.write("err\\n")
        if rank == 1:
            sys.stdout.write("no newline")
        """,
    )
    status, out, err = launch("-n", 2, script, "-m", "--help", "-n", "3", stdin="typed")
    assert status == 0
    arguments = ["-m", "--help", "-n", "3"]
    assert sorted(out.splitlines()) == [
        *("[1] no newline", f"[1] out  {arguments}", f"out typed {arguments}")
    ]
    assert sorted(err.splitlines()) == ["[1] err", "err"]


def test_lines_of_others_appear_above_the_status_lines(tmp_path):
    script = write_script(
        tmp_path,
        """
        done, ready = here / "done", here / "ready"
        if rank == 0:
            import importlib.util
            from rich.text import Text
            # Not the package, which would import Keras.
            path = importlib.util.find_spec("kbtrain").submodule_search_locations[0]
            path += "/display/screen.py"
            spec = importlib.util.spec_from_file_location("screen", path)
            screen = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(screen)
            screen.INTERVAL = 0.005
            status = screen.Screen(lambda width: [Text("x" * 50), Text("status of 0")])
            status.open()
            ready.touch()
            for i in range(40):
                print(f"line {i} of 0")
                time.sleep(0.005)
            wait_for(done.exists)
            status.close()
        else:
            wait_for(ready.exists)
            for i in range(40):
                print(f"line {i} of 1", file=sys.stderr, flush=True)
                time.sleep(0.005)
            done.touch()
            sys.exit(3)
        """,
    )
    command = [sys.executable, "-m", "kbtrain", "launch", "-n", "2", str(script)]
    shown = record(command, lines=120, columns=90)
    lines = [line for line in shown.screen if "kbtrain launch" not in line]
    assert "kbtrain launch: rank 1" in shown.text
    for name in ("", "[1] "):
        own = [f"{name}line {i} of {int(bool(name))}" for i in range(40)]
        assert [line for line in lines if line in own] == own
    assert len(lines) == 80


def test_a_module_in_place_of_a_script(tmp_path):
    (tmp_path / "program.py").write_text("import sys; print(__name__, sys.argv[1:])")
    status, out, _ = launch("-n", 1, "-m", "program", "--lr", "-n", cwd=tmp_path, environ=on_path())
    assert (status, out) == (0, "__main__ ['--lr', '-n']\n")


def on_path():
    """The environment that finds kbtrain from another folder."""
    return {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        ("os._exit(3)", 3, "exited with status 3"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "was killed by SIGKILL"),
        ("raise ValueError('wrong')", 1, "exited with status 1"),
    ],
)
def test_the_status_is_that_of_the_first_process_that_failed(tmp_path, end, status, said):
    script = write_script(
        tmp_path,
        f"""
        if rank == 1:
            note("pid", os.getpid())
            {end}
        wait_for((here / "pid").exists)
        first = int((here / "pid").read_text())
        wait_for(lambda: not alive(first))
        sys.exit("rank 0 cannot go on without rank 1")
        """,
    )
    found, _, err = launch("-n", 2, script)
    assert found == status
    pid = (tmp_path / "pid").read_text()
    lines = [line for line in err.splitlines() if line.startswith("kbtrain launch: rank")]
    place = f"on {socket.gethostname()} (process"
    assert lines[0] == f"kbtrain launch: rank 1 {place} {pid}) {said}."
    assert lines[1].startswith(f"kbtrain launch: rank 0 {place}")
    assert lines[1].endswith("exited with status 1.")
    assert "rank 0 cannot go on" in err


def test_a_process_that_hangs_is_ended(tmp_path):
    script = write_script(
        tmp_path,
        """
        if rank == 2:
            wait_for(lambda: all((here / f"{r}.json").exists() for r in (0, 1)))
            sys.exit(5)
        if rank == 1:
            signal.signal(signal.SIGTERM, lambda *_: None)
        note(f"{rank}.json", os.getpid())
        while True:
            signal.pause()
        """,
    )
    status, _, err = launch("-n", 3, script, patch=QUICK)
    assert status == 5
    assert "SIGTERM for rank 0, 1, still running after another process failed" in err
    assert "SIGKILL for rank 1, still running" in err
    assert not any(is_running(pid) for pid in read_notes(tmp_path, "0.json", "1.json"))


COUNT_SIGNALS = """
received = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda number, _: received.append(number))
note(f"{rank}.ready", os.getpid())
wait_for(lambda: received)
wait_for((here / "go").exists)
note(f"{rank}.json", json.dumps(received))
os._exit(128 + received[0])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("patch", ["", "import signal; del signal.sigtimedwait"])
def test_a_signal_reaches_each_process_once_and_is_no_failure(tmp_path, number, patch):
    script = write_script(tmp_path, COUNT_SIGNALS)
    words = ("-n", 2, "--max-restarts", 3, script)
    with started(*words, patch=f"{QUICK}{patch}") as launcher:
        read_notes(tmp_path, "0.ready", "1.ready")
        launcher.send_signal(number)
        (tmp_path / "go").touch()
        out, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + number
    assert (out, err) == ("", "")
    assert read_notes(tmp_path, "0.json", "1.json") == [[number], [number]]


@pytest.mark.parametrize("patch", ["", "import signal; del signal.sigtimedwait"])
def test_processes_that_ignore_sigterm_are_killed_after_the_grace_period(tmp_path, patch):
    script = write_script(
        tmp_path,
        """
        signal.signal(signal.SIGTERM, lambda *_: note(f"{rank}.asked"))
        note(f"{rank}.json", os.getpid())
        while True:
            signal.pause()
        """,
    )
    words = ("-n", 2, "--grace-period", 1.5, "--max-restarts", 3, script)
    with started(*words, patch=patch) as launcher:
        pids = read_notes(tmp_path, "0.json", "1.json")
        launcher.send_signal(signal.SIGTERM)
        for rank in range(2):
            wait_for((tmp_path / f"{rank}.asked").exists, "each process gets SIGTERM")
        assert all(is_running(pid) for pid in pids)
        _, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + signal.SIGKILL
    assert "SIGKILL for rank 0, 1, still running 1.5 s after SIGTERM" in err
    assert "starting all processes again" not in err
    assert not any(is_running(pid) for pid in pids)


def test_ctrl_c_at_a_terminal_reaches_each_process_once(tmp_path):
    script = write_script(tmp_path, COUNT_SIGNALS)
    terminal = (
        "import os, pty, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        "command = [sys.executable, '-m', 'kbtrain', *sys.argv[1:]]\n"
        "os._exit(os.waitstatus_to_exitcode(pty.spawn(command)))\n"
    )
    with started("-n", 2, script, patch=terminal) as outer:
        read_notes(tmp_path, "0.ready", "1.ready")
        outer.stdin.write("\x03")
        outer.stdin.flush()
        (tmp_path / "go").touch()
        assert read_notes(tmp_path, "0.json", "1.json") == [[signal.SIGINT], [signal.SIGINT]]
        assert outer.wait(60) == 130


def test_a_signal_for_one_process_alone_is_not_taken_for_a_failure(tmp_path):
    """A pre-emption notice stops the whole run; writing the checkpoint may take its time."""
    script = write_script(
        tmp_path,
        """
        if rank == 1:
            note("pid", os.getpid())
            os._exit(143)
        wait_for((here / "pid").exists)
        first = int((here / "pid").read_text())
        wait_for(lambda: not alive(first))
        time.sleep(1)  # longer than QUICK allows after a failure
        note("saved")
        os._exit(143)
        """,
    )
    assert launch("-n", 2, "--max-restarts", 1, script, patch=QUICK) == (143, "", "")
    assert (tmp_path / "saved").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux does it")
def test_no_process_outlives_a_killed_launcher(tmp_path):
    script = write_script(
        tmp_path,
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        note(f"{rank}.json", os.getpid())
        while True:
            signal.pause()
        """,
    )
    with started("-n", 2, script) as launcher:
        pids = read_notes(tmp_path, "0.json", "1.json")
        assert all(is_running(pid) for pid in pids)
        launcher.kill()
        wait_for(lambda: not any(is_running(pid) for pid in pids), "the processes end")


@pytest.mark.parametrize(("restarts", "status", "starts"), [(0, 4, 1), (1, 4, 2), (2, 0, 3)])
def test_restarts(tmp_path, restarts, status, starts):
    script = write_script(
        tmp_path,
        """
        start = sum((here / f"{rank}.{n}").exists() for n in range(9))
        note(f"{rank}.{start}", os.environ["MASTER_PORT"])
        if rank == 0:
            wait_for((here / f"1.{start}").exists)
            sys.exit(4 if start < 2 else 0)
        wait_for((here / f"0.{start}").exists)
        """,
    )
    found, _, err = launch("-n", 2, "--max-restarts", restarts, script)
    assert found == status
    assert len(list(tmp_path.glob("1.*"))) == len(list(tmp_path.glob("0.*"))) == starts
    assert err.count("starting all processes again") == starts - 1
    assert err.count("rank 0") == min(starts, 2)


def test_two_machines_meet_and_restart_together(tmp_path):
    script = write_script(
        tmp_path,
        """
        start = sum((here / f"{rank}.{n}").exists() for n in range(9))
        note(f"{rank}.{start}", json.dumps(dict(os.environ)))
        wait_for(lambda: all((here / f"{r}.{start}").exists() for r in range(3)))
        sys.exit(4 if start == 0 else 0)
        """,
    )
    address = f"127.0.0.1:{free_ports(6)}"
    words = ("--nodes", 2, "--address", address, "--max-restarts", 1)
    with started("-n", 1, *words, "--node-rank", 1, script) as second:
        status, _, err = launch("-n", 2, *words, "--node-rank", 0, script)
        _, second_err = second.communicate(timeout=60)
    assert (status, second.returncode) == (0, 0), err + second_err
    for start in range(2):
        found = read_notes(tmp_path, *(f"{rank}.{start}" for rank in range(3)))
        groups = [detect(environ) for environ in found]
        assert [group.rank for group in groups] == [0, 1, 2]
        assert [group.local_rank for group in groups] == [0, 1, 0]
        assert {group.address for group in groups} == {"127.0.0.1"}
        assert len({group.addresses for group in groups}) == 1
        ports = [address.rpartition(":")[2] for address in groups[0].addresses]
        assert ports == [str(groups[0].port + 1 + rank) for rank in range(3)]


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (("--nodes", 3, "--node-rank", 1), "--nodes must be the same"),
        (("--nodes", 2, "--node-rank", 1, "--max-restarts", 2), "--max-restarts must be the same"),
        (("--nodes", 2, "--node-rank", 0), "Cannot listen at port"),
    ],
)
def test_machines_that_do_not_fit_together(tmp_path, own, said):
    script = write_script(tmp_path, "")
    port = free_ports(5)
    common = ("-n", 1, "--address", f"127.0.0.1:{port}")
    with started(*common, "--nodes", 2, "--node-rank", 0, script) as first:
        wait_for(lambda: is_listening(port), "machine 0 listens")
        status, _, err = launch(*common, *own, script)
        assert status == 2
        assert said in err
        if "must be the same" in said:
            _, first_err = first.communicate(timeout=60)
            assert first.returncode == 2
            assert said in first_err


def test_two_machines_with_the_same_rank(tmp_path):
    script = write_script(tmp_path, "")
    port = free_ports(6)
    common = ("-n", 1, "--address", f"127.0.0.1:{port}", "--nodes", 3, "--node-rank")
    with (
        started(*common, 0, script) as first,
        started(*common, 1, script) as second,
        started(*common, 1, script) as third,
    ):
        for launcher in (first, second, third):
            _, err = launcher.communicate(timeout=60)
            assert launcher.returncode == 2
            assert "both started with --node-rank 1" in err


@pytest.mark.parametrize(
    ("rank", "said"), [(0, "machine 1 (its --node-rank) has not"), (1, "cannot be reached")]
)
def test_a_machine_that_does_not_come_is_named(tmp_path, rank, said):
    script = write_script(tmp_path, "")
    quick = "from kbtrain.distributed.launch import rendezvous as r\nr.FIRST_SECONDS = 0.3"
    words = ("--nodes", 2, "--node-rank", rank, "--address", f"127.0.0.1:{free_ports(5)}")
    status, _, err = launch("-n", 1, *words, script, patch=quick)
    assert status == 2
    assert "Not all of the 2 machines were ready" in err
    assert said in err


def is_listening(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-n", "2"], "Name the script"),
        (["-n", "0", "train.py"], "-n must be at least 1"),
        (["-n", "2", "--max-restarts", "-1", "train.py"], "--max-restarts must be at least 0"),
        (["-n", "2", "--grace-period", "-1", "train.py"], "--grace-period must not be negative"),
        (["-n", "2", "no_such_script.py"], "no_such_script.py"),
        (["-n", "2", __file__, "--nodes"], ""),
        (["-n", "2", "--address", "a:1", __file__], "give --nodes"),
        (["-n", "2", "--nodes", "2", "--address", "a:1", __file__], "--node-rank must be"),
        (["-n", "2", "--nodes", "2", "--node-rank", "2", __file__], "from 0 to 1"),
        (["-n", "2", "--nodes", "2", "--node-rank", "1", __file__], "--address must be"),
        (
            ["-n", "2", "--nodes", "2", "--node-rank", "1", "--address", "a:b", __file__],
            "node1:29400",
        ),
    ],
)
def test_mistakes_in_the_command(capsys, monkeypatch, words, said):
    monkeypatch.setattr("kbtrain.cli.launch.run_together", lambda *_, **__: pytest.fail("started"))
    if not said:
        with pytest.raises(pytest.fail.Exception, match="started"):
            cli.main(["launch", *words])
        return
    assert cli.main(["launch", *words]) == 2
    assert said in capsys.readouterr().err
