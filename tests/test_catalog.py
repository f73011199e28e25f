"""The catalog under any sequence of runs, kills, additions, changes and removals of files."""

from collections import Counter
from types import SimpleNamespace

import pyarrow as pa
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vop import catalog
from vop.catalog import OK, PLANNED, QUARANTINED, REMOVED, REPLACED

CURRENT = {PLANNED, OK, QUARANTINED}
names = st.sampled_from([f"{folder}{letter}.jpg" for folder in ("", "s/") for letter in "abcdef"])


def listing(disk) -> pa.Table:
    rows = [{"name": name, "scene": "", "size": file.size, "modified_ns": file.modified} for name, file in disk.items()]
    return pa.Table.from_pylist(rows, schema=pa.schema([catalog.SCHEMA.field(name) for name in catalog.LISTED]))


def file(content="0", size=10, modified=1, readable=True, good=True):
    return SimpleNamespace(content=content, size=size, modified=modified, readable=readable, good=good)


class Work:
    """What `vop embed` does with a catalog, without images: a disk, a store's catalog and its receipts."""

    def __init__(self):
        self.disk: dict[str, SimpleNamespace] = {}
        self.images = catalog.SCHEMA.empty_table()
        self.receipts: dict[int, dict] = {}
        self.facts: dict[int, list[dict]] = {}
        self.hashed: list[str] = []

    def content(self, name):
        self.hashed.append(name)
        return self.disk[name].content if self.disk[name].readable else None

    def plan(self, shard_size=3, prune=False):
        self.hashed = []
        finished = catalog.finish(self.images, self.receipts, self.embedded)
        planned = catalog.plan(finished, listing(self.disk), shard_size, prune, self.content)
        self.images = planned.images
        return planned

    def compute(self, shards=1000):
        """Embed at most so many of the pending shards (a kill comes after them); returns how many images."""
        pending = catalog.pending(self.images, self.receipts)
        done = list(pending.items())[:shards]
        for number, shard in done:
            assert number not in self.receipts
            self.facts[number], bad = [], []
            for line in shard.to_pylist():
                now = self.disk.get(line["name"])
                content = now.content if now and now.readable else None
                if content is not None and now.good:
                    sizes = dict.fromkeys(("width", "height", "scaled_width", "scaled_height"), 8)
                    self.facts[number].append({"image_id": line["image_id"], "content": content} | sizes)
                else:
                    bad.append({"image_id": line["image_id"], "reason": "bad", "content": content})
            self.receipts[number] = {"quarantined": bad}
        return sum(shard.num_rows for _, shard in done)

    def embedded(self, number):
        schema = ("image_id", "content", "width", "height", "scaled_width", "scaled_height")
        return pa.Table.from_pylist(self.facts[number], schema=pa.schema([catalog.SCHEMA.field(n) for n in schema]))

    def run(self, **options):
        planned = self.plan(**options)
        computed = self.compute()
        self.images = catalog.finish(self.images, self.receipts, self.embedded)
        return planned, computed

    def current(self):
        return {row["name"]: row for row in self.images.to_pylist() if row["status"] in CURRENT}


class Runs(RuleBasedStateMachine):
    """Any history of a collection and of the runs over it."""

    def __init__(self):
        super().__init__()
        self.work, self.clock, self.shard_size = Work(), 1, 3
        self.fixed: dict[int, tuple] = {}

    def tick(self):
        self.clock += 1
        return self.clock

    @rule(name=names, readable=st.booleans(), good=st.booleans())
    def add(self, name, readable, good):
        self.work.disk.setdefault(name, file(str(self.tick()), 10, self.clock, readable, good))

    @precondition(lambda self: self.work.disk)
    @rule(data=st.data(), other_size=st.booleans())
    def change(self, data, other_size):
        changed = self.work.disk[data.draw(st.sampled_from(sorted(self.work.disk)))]
        changed.content, changed.modified = str(self.tick()), self.clock
        changed.size += other_size

    @precondition(lambda self: self.work.disk)
    @rule(data=st.data())
    def touch(self, data):
        self.work.disk[data.draw(st.sampled_from(sorted(self.work.disk)))].modified = self.tick()

    @precondition(lambda self: self.work.disk)
    @rule(data=st.data())
    def change_permissions(self, data):
        changed = self.work.disk[data.draw(st.sampled_from(sorted(self.work.disk)))]
        changed.readable = not changed.readable  # neither size nor time changes

    @precondition(lambda self: self.work.disk)
    @rule(data=st.data())
    def remove(self, data):
        del self.work.disk[data.draw(st.sampled_from(sorted(self.work.disk)))]

    @rule(size=st.integers(1, 4))
    def set_shard_size(self, size):
        self.shard_size = size

    @rule(shards=st.integers(0, 3), prune=st.booleans())
    def killed_run(self, shards, prune):
        self.work.plan(self.shard_size, prune)
        self.work.compute(shards)

    @rule(prune=st.booleans())
    def run(self, prune):
        work = self.work
        work.run(shard_size=self.shard_size, prune=prune)
        current = work.current()
        assert PLANNED not in {row["status"] for row in current.values()}
        assert set(work.disk) <= set(current)
        if prune:
            assert set(work.disk) == set(current)
        for name, on_disk in work.disk.items():
            row = current[name]
            if on_disk.readable:  # what lies in the store is what lies on the disk
                assert row["content"] == on_disk.content
                assert row["status"] == (OK if on_disk.good else QUARANTINED)
                assert (row["size"], row["modified_ns"]) == (on_disk.size, on_disk.modified)
        before, receipts = work.images, dict(work.receipts)
        again, computed = work.run(shard_size=self.shard_size)
        assert computed == again.added == again.changed == 0
        assert again.vanished == sorted(set(current) - set(work.disk))
        assert work.images.equals(before)
        assert work.receipts == receipts

    @invariant()
    def every_name_has_one_current_row(self):
        rows = self.work.images.to_pylist()
        assert max(Counter(row["name"] for row in rows if row["status"] in CURRENT).values(), default=1) == 1
        assert [row["image_id"] for row in rows] == list(range(len(rows)))
        assert {row["status"] for row in rows} <= CURRENT | {REPLACED, REMOVED}

    @invariant()
    def rows_once_written_never_move(self):
        shards = [row["shard"] for row in self.work.images.to_pylist()]
        assert shards == sorted(shards)
        for row in self.work.images.to_pylist():
            place = (row["name"], row["shard"])
            assert self.fixed.setdefault(row["image_id"], place) == place
            if row["row"] is not None:
                assert self.work.facts[row["shard"]][row["row"]]["image_id"] == row["image_id"]
        assert max(Counter(shards).values(), default=0) <= 4

    @invariant()
    def an_image_is_usable_if_and_only_if_it_has_a_row(self):
        for row in self.work.images.to_pylist():
            if row["status"] == OK:
                assert row["row"] is not None
            if row["status"] in (PLANNED, QUARANTINED):
                assert row["row"] is None


TestRuns = Runs.TestCase
TestRuns.settings = settings(max_examples=60, stateful_step_count=25)


def work_on(**disk):
    work = Work()
    work.disk = {f"{name}.jpg": made for name, made in disk.items()}
    work.run()
    return work


def test_new_images_are_planned_by_name_into_shards_after_the_old_ones():
    work = work_on(**{name: file() for name in "dbeca"})
    assert [(row["name"], row["shard"], row["row"]) for row in work.images.to_pylist()] == [
        *(("a.jpg", 0, 0), ("b.jpg", 0, 1), ("c.jpg", 0, 2)),
        *(("d.jpg", 1, 0), ("e.jpg", 1, 1)),
    ]
    work.disk |= {"aa.jpg": file(), "A.jpg": file()}
    planned, computed = work.run()
    assert (planned.added, planned.changed, computed) == (2, 0, 2)
    new = work.images.to_pylist()[5:]
    assert [(row["name"], row["shard"], row["row"]) for row in new] == [("A.jpg", 2, 0), ("aa.jpg", 2, 1)]


def test_a_touched_file_is_looked_at_and_left():
    work = work_on(a=file(), b=file())
    work.disk["a.jpg"].modified = 99
    planned, computed = work.run()
    assert (planned.added, planned.changed, computed, work.hashed) == (0, 0, 0, ["a.jpg"])
    work.run()
    assert work.hashed == []  # the new time is known now


@pytest.mark.parametrize(("size", "hashed"), [(10, ["a.jpg"]), (11, [])])
def test_a_changed_file_is_embedded_anew_and_its_old_row_stays(size, hashed):
    work = work_on(a=file(), b=file())
    work.disk["a.jpg"] = file("new", size, modified=2)
    planned, computed = work.run()
    assert (planned.added, planned.changed, computed, work.hashed) == (0, 1, 1, hashed)
    assert [(row["name"], row["shard"], row["status"]) for row in work.images.to_pylist()] == [
        *(("a.jpg", 0, REPLACED), ("b.jpg", 0, OK), ("a.jpg", 1, OK)),
    ]


def test_a_file_that_could_not_be_read_is_planned_again_when_it_can():
    work = work_on(a=file(readable=False), b=file(good=False))
    assert {name: row["status"] for name, row in work.current().items()} == dict.fromkeys(
        ("a.jpg", "b.jpg"), QUARANTINED
    )
    planned, computed = work.run()
    assert (planned.changed, computed, work.hashed) == (0, 0, ["a.jpg"])  # a bad image is not even read again
    work.disk["a.jpg"].readable = True
    planned, computed = work.run()
    assert (planned.changed, computed) == (1, 1)
    assert work.current()["a.jpg"]["status"] == OK


def test_a_vanished_image_stays_until_it_is_pruned():
    work = work_on(a=file(), b=file())
    del work.disk["a.jpg"]
    assert work.run()[0].vanished == ["a.jpg"]
    assert work.current()["a.jpg"]["status"] == OK
    assert work.run(prune=True)[0].vanished == []
    assert "a.jpg" not in work.current()
    work.disk["a.jpg"] = file()
    planned, computed = work.run()
    assert (planned.added, computed) == (1, 1)


def test_an_image_that_changes_while_its_shard_waits_is_embedded_once():
    """A kill between the plan and the shard: what is embedded then is what lies there then."""
    work = Work()
    work.disk = {"a.jpg": file()}
    work.plan()
    work.disk["a.jpg"] = file("new", 20, 2)
    assert work.run()[1] == 1
    assert work.run()[1] == 0
    assert work.current()["a.jpg"]["content"] == "new"


def test_an_image_that_changes_after_a_kill_is_noticed_by_the_next_run():
    """A kill between the shard and the catalog: the row is embedded, but of the file as it was."""
    work = Work()
    work.disk = {"a.jpg": file()}
    work.plan()
    work.compute()
    work.disk["a.jpg"] = file("new", 20, 2)
    planned, computed = work.run()
    assert (planned.changed, computed) == (1, 1)
    assert work.current()["a.jpg"]["content"] == "new"


def test_the_sample_is_spread_over_the_names():
    table = listing({f"{i:03d}.jpg": file() for i in reversed(range(100))})
    assert catalog.sample(table, 5)["name"].to_pylist() == ["000.jpg", "025.jpg", "050.jpg", "074.jpg", "099.jpg"]
    assert catalog.sample(table, 1)["name"].to_pylist() == ["000.jpg"]
    assert catalog.sample(table, 500)["name"].to_pylist() == sorted(table["name"].to_pylist())


def test_too_many_bad_images_end_a_job():
    work = work_on(a=file(good=False), b=file(), c=file(), d=file(), e=file())
    work.disk |= {f"{i}.jpg": file() for i in range(5)}
    work.plan()
    guard = catalog.BadImages(work.images, work.receipts, 0.2)
    guard.add(1)  # with the one already there 2 of 10: exactly the share that is tolerated
    with pytest.raises(catalog.TooManyBadImagesError, match=r"3 of 10 images .*max_bad_fraction=0\.2"):
        guard.add(1)


def test_counts_and_reasons_for_people():
    work = work_on(a=file(good=False), b=file(), c=file())
    work.disk |= {"b.jpg": file("new", modified=2), "d.jpg": file()}
    del work.disk["c.jpg"]
    planned, _ = work.run()
    assert catalog.summary(work.images, planned) == {
        "images": 3,
        "quarantined": 1,
        "added": 1,
        "changed": 1,
        "vanished": 1,
    }
    assert list(catalog.quarantined(work.images)) == [("a.jpg", "bad")]


def test_a_planned_shard_finds_its_files():
    work = Work()
    work.disk = {"a.jpg": file(), "b.jpg": file()}
    work.plan()
    (shard,) = catalog.pending(work.images, {}).values()
    located = catalog.located(shard, {"a.jpg": "/elsewhere/a.jpg"}, "/root")
    assert located.to_pylist() == [
        {"image_id": 0, "name": "a.jpg", "shard": 0, "path": "/elsewhere/a.jpg", "shard_rows": 2},
        {"image_id": 1, "name": "b.jpg", "shard": 0, "path": "/root/b.jpg", "shard_rows": 2},
    ]
