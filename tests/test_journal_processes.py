"""The journal when processes are killed, share it, or run out of disk; and its memory."""

import asyncio
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from journals import HAMMER, UNITS, ask, begin, new, rows, start

from nuner_jax.annotate.journal.journal import Journal, Totals
from nuner_jax.annotate.units import Outcome, Pending, Unit
from nuner_jax.errors import NunerError

# Processes


def test_a_process_killed_at_any_moment_loses_nothing_that_it_was_told_was_kept(tmp_path):
    path, rng = tmp_path / "journal.sqlite", random.Random(7)
    texts = [Unit.of(f"text {number}", "a") for number in range(6000)]
    with Journal.open(path, {}) as journal:
        journal.set_units(texts, "all")
    begun, done = [], set()
    for _ in range(8):
        process = start(HAMMER, path)
        assert process.stdout.readline() == "open\n"
        lines = [process.stdout.readline() for _ in range(rng.randrange(400))]
        time.sleep(rng.uniform(0, 0.01))
        process.send_signal(signal.SIGKILL)
        told = [line.split() for line in "".join([*lines, process.stdout.read()]).splitlines()]
        process.wait()
        told_done = {line[1] for line in told if len(line) == 2 and line[0] == "done" and len(line[1]) == 20}
        told_begun = [line[1] for line in told if len(line) == 2 and line[0] == "begun" and len(line[1]) == 20]
        assert not done.intersection(told_begun), "a unit that was done was asked for again"
        begun += told_begun
        with Journal.open(path, {}, read_only=True) as journal:
            kept = {unit.id for unit in journal.completions() if unit.state == "done" and unit.completion == unit.text}
            attempted = {unit for (unit,) in rows(journal, "SELECT unit FROM attempts")}
            assert rows(journal, "PRAGMA integrity_check") == [("ok",)]
        assert told_done <= kept
        assert set(told_begun) <= attempted
        assert done <= kept
        done = kept
    with Journal.open(path, {}) as journal:
        journal.abandoned()
        totals = journal.totals()
        assert totals.done == totals.spent == len(done) and totals.unsure == 3 * totals.lost
        assert totals.done + totals.lost == totals.attempts
        assert 0 < totals.lost <= 8 * 16
        assert len(begun) >= totals.done - 8 * 16 and done
        assert totals.done < 6000, "the units ran out before the last kill"


MAKER = """
    import sys
    from pathlib import Path
    from nuner_jax.annotate.journal.journal import Journal
    from nuner_jax.annotate.units import Unit
    units = [Unit.of(f"text {number}", "a") for number in range(20_000)]
    print("ready", flush=True)
    with Journal.open(Path(sys.argv[1]), {}) as journal:
        print("open", flush=True)
        journal.set_units(units, sys.argv[2])
        print("selected", flush=True)
"""


def test_a_process_killed_while_it_makes_the_journal_leaves_all_of_a_step_or_nothing(tmp_path):
    path, rng, seen = tmp_path / "journal.sqlite", random.Random(3), set()
    whole_time = 0.0  # of the first, which is not killed
    for attempt in range(8):
        if attempt % 3 == 1:
            for file in tmp_path.iterdir():
                file.unlink()
        process = start(MAKER, path, attempt)
        assert process.stdout.readline() == "ready\n"
        began = time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=rng.uniform(0, whole_time) if attempt else None)
        whole_time = whole_time if attempt else time.monotonic() - began
        process.kill()
        told = process.stdout.read()
        process.wait()
        with Journal.open(path, {}) as journal:
            if "selected" in told:
                assert journal.fingerprint() == str(attempt)
            if journal.fingerprint() == str(attempt):
                assert journal.totals().units == len(list(journal.completions())) == 20_000
            seen.add(journal.fingerprint())
    assert len(seen) > 1


HOLDER = """
    import sys
    from pathlib import Path
    from nuner_jax.annotate.journal.journal import Journal
    journal = Journal.open(Path(sys.argv[1]), {})
    print("open", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_and_told_who_has_the_journal_until_that_one_is_gone(tmp_path):
    path = tmp_path / "journal.sqlite"
    process = start(HOLDER, path)
    try:
        assert process.stdout.readline() == "open\n"
        with pytest.raises(NunerError, match=rf"journal.sqlite: in use by process {process.pid} on \S+; one process"):
            Journal.open(path, {})
        with Journal.open(path, {}, read_only=True) as journal:
            assert journal.totals() == Totals()
        process.kill()
        process.wait()
        with Journal.open(path, {}) as journal:
            with pytest.raises(NunerError, match=f"in use by process {os.getpid()} on"):
                Journal.open(path, {})
            assert journal.totals() == Totals()
        with Journal.open(path, {}):
            pass
    finally:
        process.kill()
        process.wait()


def test_a_reader_sees_what_another_process_has_written_and_writes_nothing(tmp_path):
    units = [Unit.of(f"text {number}", "a") for number in range(3000)]
    with Journal.open(tmp_path / "journal.sqlite", {}) as journal:
        journal.set_units(units, "all")
    process = start(HAMMER, tmp_path / "journal.sqlite")
    assert process.stdout.readline() == "open\n"
    with Journal.open(tmp_path / "journal.sqlite", {}, read_only=True) as reader:
        seen = []
        for line in process.stdout:
            if line.startswith("done") and len(seen) < 20:
                unit = line.split()[1]
                assert unit in {one.id for one in reader.completions() if one.state == "done"}
                seen.append(reader.totals().done)
        assert process.wait() == 0
        assert seen == sorted(seen) and seen[0] >= 1
        assert reader.totals().done == 3000
        for write in (reader.abandoned, reader.retry_failed, lambda: reader.set_units([], "none")):
            with pytest.raises(NunerError, match="open for reading only"):
                write()
        with pytest.raises(NunerError, match="open for reading only"):
            asyncio.run(reader.begin(reader.pending(-1, 1), 1))


def test_a_program_that_fails_without_closing_its_journal_ends(tmp_path, run_python):
    script = (
        "import sys; from pathlib import Path; from nuner_jax.annotate.journal.journal import Journal;"
        "journal = Journal.open(Path(sys.argv[1]), {}); raise SystemExit('failed')"
    )
    result = run_python("-c", script, str(tmp_path / "journal.sqlite"), check=False, timeout=30)
    assert result.returncode == 1 and "failed" in result.stderr


def test_a_closed_journal_says_so(tmp_path):
    journal = new(tmp_path)
    journal.close()
    journal.close()
    with pytest.raises(NunerError, match="journal.sqlite: the journal is closed"):
        begin(journal, [Pending(0, UNITS[0].id, "text 0", 0)])
    assert sorted(file.name for file in tmp_path.iterdir()) == [".journal.sqlite.lock", "journal.sqlite"]


# A full disk


def test_a_full_disk_stops_nothing_but_what_did_not_fit_and_goes_on_when_there_is_space(tmp_path):
    """The limit on pages is SQLite's own; it fails as a full disk does (SQLITE_FULL)."""
    units = [Unit.of(f"text {number}", "a") for number in range(200)]
    with new(tmp_path, units) as journal:

        def limit(pages):
            journal._writer.write_now(lambda db: (db.execute(f"PRAGMA max_page_count = {pages}"), Totals()))

        page = journal.pending(-1, 200)
        ask(journal, page[:1], ("done", "x"), cost=1)
        begun = begin(journal, page[1:2])
        limit(rows(journal, "PRAGMA page_count")[0][0] + 20)
        kept = 1

        async def fill():
            requests = [await journal.begin([unit], 1) for unit in page[2:66]]
            ends = (
                journal.finish(request, [Outcome(unit.id, "done", "y" * 5000)], cost=1)
                for request, unit in zip(requests, page[2:66], strict=True)
            )
            return await asyncio.gather(*ends, return_exceptions=True)

        results = asyncio.run(fill())
        errors = [result for result in results if result is not None]
        kept += len(results) - len(errors)
        assert errors and all(isinstance(error, NunerError) for error in errors)
        assert str(errors[0]).startswith(f"{journal.path}: database or disk is full; free space there")
        assert journal.totals().done == kept == sum(unit.state == "done" for unit in journal.completions())
        limit(2**30)
        asyncio.run(journal.finish(begun, [Outcome(page[1].id, "done", "z" * 5000)], cost=1))
        assert journal.totals().done == kept + 1
        final = journal.totals()
    with new(tmp_path, units) as journal:
        assert journal.totals() == final
        assert journal.abandoned() == final.in_flight == len(errors)


FULL = """
    import asyncio, resource, sys
    from pathlib import Path
    from nuner_jax.annotate.journal.journal import Journal
    from nuner_jax.annotate.units import Outcome, Unit
    from nuner_jax.errors import NunerError

    async def one(unit):
        request = await journal.begin([unit], 1)
        await journal.finish(request, [Outcome(unit.id, "done", unit.text * 200)], cost=1)

    path = Path(sys.argv[1])
    with Journal.open(path, {}) as journal:
        journal.set_units((Unit.of(f"text {number}", "a") for number in range(300)), "all")
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, unlimited[1]))
        for unit in journal.pending(-1, 300):
            try:
                asyncio.run(one(unit))
            except NunerError as error:
                print(error, flush=True)
                break
        print(journal.totals().done, flush=True)
        if sys.argv[2] == "go on":
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
            for unit in journal.pending(-1, 300):
                asyncio.run(one(unit))
"""


@pytest.mark.parametrize("then", ["go on", "end"])
def test_a_write_that_the_system_refuses_loses_nothing_that_was_kept(tmp_path, then):
    """A limit on file size stands for the full disk: here the write itself fails, with any user's rights."""
    path = tmp_path / "journal.sqlite"
    process = start(FULL, path, then)
    message, done = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 0
    assert message.startswith(f"{path}: disk I/O error; free space there")
    assert 0 < int(done) < 300
    with Journal.open(path, {}) as journal:
        lost = journal.abandoned()
        assert journal.totals().done == (300 - lost if then == "go on" else int(done))
        assert lost <= 1
        assert all(unit.completion == unit.text * 200 for unit in journal.completions() if unit.state == "done")


FULL_DISK = """
    import asyncio, random, subprocess, sys
    from pathlib import Path
    from nuner_jax.annotate.journal.journal import Journal
    from nuner_jax.annotate.units import Outcome, Unit
    from nuner_jax.errors import NunerError

    disk, rng = Path(sys.argv[1]), random.Random(1)
    path = disk / "journal.sqlite"

    def resize(size):
        subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)

    async def caller(shared):
        for unit in shared:
            try:
                request = await journal.begin([unit], 1)
            except NunerError as error:
                assert str(error).startswith(f"{path}: "), error
                return 1
            await asyncio.sleep(rng.uniform(0, 0.05))
            await journal.finish(request, [Outcome(unit.id, "done", unit.text * 400)], cost=1)  # never fails
        return 0

    async def callers():
        shared = iter(journal.pending(-1, 10_000))
        print("refused", sum(await asyncio.gather(*(caller(shared) for _ in range(256)))))
        print("done", journal.totals().done, "in flight", journal.totals().in_flight)

    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=10m", "none", disk], check=True)
    print("mounted", flush=True)
    try:
        Journal.open(path, {})
    except NunerError as error:
        print(error)
    resize("22m")
    with Journal.open(path, {}) as journal:
        journal.set_units((Unit.of(f"text {number}", "a") for number in range(2000)), "all")
        asyncio.run(callers())
        resize("200m")
        asyncio.run(callers())
"""


def test_on_a_full_disk_every_answer_that_is_paid_for_is_still_recorded(tmp_path):
    """A small disk of its own, which needs a Linux that lets users mount one."""
    command = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    script = [sys.executable, "-c", textwrap.dedent(FULL_DISK), tmp_path]
    result = subprocess.run([*command, *script], capture_output=True, text=True, timeout=60)
    if "mounted" not in result.stdout:
        pytest.skip("nothing may be mounted here")
    assert result.returncode == 0, result.stderr
    _, no_space, refused, done, then_refused, then_done = result.stdout.splitlines()
    assert no_space.startswith(f"{tmp_path}/journal.sqlite: cannot be written (No space left on device")
    assert refused == "refused 256" and done.endswith(" in flight 0")
    assert 256 <= int(done.split()[1]) < 2000
    assert (then_refused, then_done) == ("refused 0", "done 2000 in flight 0")


# Size

MEMORY = """
    import resource, sys
    from pathlib import Path
    from nuner_jax.annotate.journal.journal import Finish, Journal
    from nuner_jax.annotate.units import Outcome, Unit

    def use(number, fingerprint):
        journal.set_units((Unit.of(f"{place} " * 200, "a") for place in range(number)), fingerprint)
        after = -1
        while page := journal.pending(after, 500):
            after = page[-1].position
            _, requests = journal.begin_batch([([unit], 1) for unit in page])
            journal.finish_many(
                Finish(request, [Outcome(unit.id, "done", unit.text)]) for request, unit in zip(requests, page)
            )
        assert sum(unit.state == "done" for unit in journal.completions()) == number
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    with Journal.open(Path(sys.argv[1]), {}) as journal:
        few = use(2_000, "few")
        print((use(int(sys.argv[2]), "many") - few) // 1024)
"""


def test_memory_does_not_grow_with_the_journal(tmp_path, run_python):
    result = run_python("-c", textwrap.dedent(MEMORY), str(tmp_path / "journal.sqlite"), "20000")
    assert (tmp_path / "journal.sqlite").stat().st_size > 40_000_000
    assert int(result.stdout) < 10  # MiB more than for a tenth of it
