"""Defects in what makes storage durable and deletion safe; the enumeration must fail on every one of them.

Each row names the cheapest part of the enumeration that finds it.
"""

from __future__ import annotations

from tests.support.mutant import Mutation

__all__ = ["MUTATIONS"]

LOCAL, TREE, GC = "moc/store/local.py", "moc/store/tree.py", "moc/gc.py"
GUESTS = "moc/agent/guests.py"


def _enumerated(*parts: str, is_whole: bool = False) -> tuple[str, ...]:
    """Return the ids of tests: each part is a family and a workflow."""
    name = "test_every_promise_is_kept" + ("_in_every_case" if is_whole else "")
    return tuple(f"tests/enumeration/test_crash_points.py::{name}[{part}]" for part in parts)


def _delivered(way: str) -> tuple[str, ...]:
    """Return the id of the test of every case of a replica's way."""
    name = "test_nothing_acknowledged_is_lost_and_nothing_half_is_held_in_every_case"
    return (f"tests/enumeration/test_replication.py::{name}[{way}]",)


_MAKE = """            with contextlib.suppress(FileExistsError):
                self._files.make_directory(directory)
            require_kind"""
_MAKE_SYNCED = """            try:
                self._files.make_directory(directory)
                self._sync_directory(os.path.dirname(directory))
            except FileExistsError:
                pass
            require_kind"""
_LOOP = """            if directory == self._root:
                break
"""
_MAKE_AND_SYNC = f'''{_MAKE}(self._files.facts(directory), directory, "directory")

    def sync_directories(self, key: str) -> None:
        """Make every name on the way to the object durable, from the object up.

        Also the names that were there before: the process that made them may have died before it synced them.
        """
        directory = os.path.dirname(f"{{self._root}}/{{key}}")
        while True:
            self._sync_directory(directory)
{_LOOP}'''

MUTATIONS = (
    Mutation(
        name="a file is not synced",
        file=LOCAL,
        old="                self._files.fsync(handle)\n",
        new="                pass\n",
        tests=_enumerated("crashes-first-save"),
    ),
    Mutation(
        name="no folder is synced after a put",
        file=LOCAL,
        old="            self._tree.sync_directories(key)\n",
        new="",
        tests=_enumerated("crashes-first-save"),
    ),
    Mutation(
        name="the object's own folder is not synced",
        file=TREE,
        old='        directory = os.path.dirname(f"{self._root}/{key}")\n        while True:\n',
        new='        directory = os.path.dirname(f"{self._root}/{key}")\n'
        "        directory = os.path.dirname(directory) if directory != self._root else directory\n"
        "        while True:\n",
        tests=_enumerated("crashes-further-save"),
    ),
    Mutation(
        name="the folders above are not synced",
        file=TREE,
        old="            if directory == self._root:\n                break\n",
        new="            break\n",
        tests=_enumerated("crashes-first-save"),
    ),
    Mutation(
        name="the root is not synced",
        file=TREE,
        old=f"            self._sync_directory(directory)\n{_LOOP}",
        new=f"{_LOOP}            self._sync_directory(directory)\n",
        tests=_enumerated("crashes-first-save"),
    ),
    Mutation(
        name="the folder above the root is not synced",
        file=TREE,
        old="            self._sync_above_root()\n",
        new="",
        tests=_enumerated("crashes-first-save"),
    ),
    Mutation(
        name="only folders that this process has made are synced",
        file=TREE,
        old=_MAKE_AND_SYNC,
        new=_MAKE_AND_SYNC.replace(_MAKE, _MAKE_SYNCED).replace(_LOOP, "            break\n"),
        tests=_enumerated("double_crashes-first-save", is_whole=True),
    ),
    Mutation(
        name="a delete is not synced",
        file=LOCAL,
        old="                self._tree.sync_nearest(key)\n                self._tree.remove",
        new="                self._tree.remove",
        tests=_enumerated("crashes-collection"),
    ),
    Mutation(
        name="retention trusts that what it does not find stays away",
        file=GC,
        old="            self._repository.sync_names()\n",
        new="",
        tests=_enumerated("errors-retention-over-lives", is_whole=True),
    ),
    Mutation(
        name="a collection trusts what is not synced",
        file="moc/collect.py",
        old="    repository.sync_names()  # what is deleted below",
        new="    # what is deleted below",
        tests=_enumerated("double_crashes-collection"),
    ),
    Mutation(
        name="a collection deletes objects before the manifests that name them",
        file="moc/collect.py",
        old="    dropped = tuple(name for name in first.off_lineage if name in final.off_lineage)\n",
        new="    _delete(repository, final.victims, host=host, trace=trace)\n"
        "    dropped = tuple(name for name in first.off_lineage if name in final.off_lineage)\n",
        tests=_enumerated("crashes-collection"),
    ),
    Mutation(
        name="a collection's fence forgets the life before it",
        file="moc/collect.py",
        old="parent=Parent(incarnation=former.number, step=LAST_STEP, attempt=None),",
        new="parent=former.parent,",
        tests=_enumerated("crashes-collection"),
    ),
    Mutation(
        name="a new agent announces what it finds without syncing it",
        file="moc/agent/persister.py",
        old="        repository.sync_names()  # what a dead agent has put is announced only once it is durable\n",
        new="",
        tests=_enumerated("double_crashes-further-save"),
    ),
    Mutation(
        name="a rewind that is found done is announced without syncing it",
        file="moc/cli/rewind.py",
        old="            repository.sync_names()  # the process that wrote it may have died before that was durable\n",
        new="",
        tests=_enumerated("double_crashes-rewind"),
    ),
    Mutation(
        name="the manifest before the objects",
        file="moc/agent/persister.py",
        old='        with self._trace.span("save.persist", step=job.name.step, attempt=job.name.attempt):\n',
        new="        from moc.store.memory import MemoryStore\n\n"
        "        early = [\n"
        "            persist_rank(job.arena, record, Repository(MemoryStore()), trace=self._trace)\n"
        "            for record in job.records.values()\n"
        "        ]\n"
        "        manifest = build_manifest(_commit_plan(job.descriptor), job.name, self._parent(job), early)\n"
        "        commit(repository, manifest, trace=self._trace)\n"
        '        with self._trace.span("save.persist", step=job.name.step, attempt=job.name.attempt):\n',
        tests=_enumerated("crashes-first-save"),
    ),
    Mutation(
        name="objects are deleted before their manifests",
        file=GC,
        old='        for name in doomed:\n            with self._trace.span("retention.drop"',
        new="        self._delete(sorted(condemned - kept))\n        for name in doomed:\n"
        '            with self._trace.span("retention.drop"',
        tests=_enumerated("crashes-retention"),
    ),
    Mutation(
        name="objects are dropped without a victim list",
        file=GC,
        old="            self._repository.put_victims(self._run, self._incarnation, "
        "sorted((condemned - kept) | set(earlier)))\n",
        new="            pass\n",
        tests=_enumerated("crashes-retention"),
    ),
    Mutation(
        name="retention condemns what a later checkpoint shares",
        file=GC,
        old="        kept = {row.key for name, m in self._manifests.items() "
        "if name not in doomed for row in m.objects}\n",
        new="        kept = {\n"
        "            row.key\n"
        "            for name, m in self._manifests.items()\n"
        "            for row in m.objects\n"
        "            if name not in doomed and parse_object_key(row.key)[0] == name\n"
        "        }\n",
        tests=_enumerated("crashes-partial-retention-over-lives"),
    ),
    Mutation(
        name="the sweep takes objects of the chain's checkpoints for leftovers",
        file=GC,
        old="owner.incarnation < self._incarnation and entry.key not in named:",
        new="owner.incarnation < self._incarnation:",
        tests=_enumerated("crashes-retention-over-lives", "crashes-sweep"),
    ),
    Mutation(
        name="recovery takes the highest number",
        file="moc/plan/lineage.py",
        old="    admitted = [c for c in known if is_on_chain(links, c.incarnation, c.step, c.attempt)]\n",
        new="    return tuple(sorted(known, key=lambda c: (-c.step, -c.incarnation, c.source)))\n    admitted = []\n",
        tests=_enumerated("crashes-rewind"),
    ),
    Mutation(
        name="objects go at once with their manifests",
        file=GC,
        old="            del self._manifests[name]\n",
        new="            del self._manifests[name]\n        self._delete(sorted(condemned - kept))\n",
        tests=_enumerated("crashes-retention"),
    ),
    Mutation(
        name="temporary files stay for good",
        file=LOCAL,
        old="                if _TEMPORARY.fullmatch(facts.name)",
        new="                if not facts.name",
        tests=_enumerated("crashes-first-save"),
    ),
    Mutation(
        name="no checksum is compared after a read",
        file="moc/recover.py",
        old="            if actual != row.crc32c:\n",
        new="            if actual is None:\n",
        tests=("tests/enumeration/test_reading.py::test_a_flipped_byte_anywhere_never_reaches_the_training_state",),
    ),
    Mutation(
        name="an object that cannot be read stops the recovery",
        file="moc/restoration.py",
        old="        if _is_unread(error, candidate):\n",
        new="        if False:\n",
        tests=("tests/enumeration/test_reading.py",),
    ),
    Mutation(
        name="storage that does not answer costs a checkpoint",
        file="moc/restoration.py",
        old="if is_needed and (candidate == self._wanted[-1] or not self._repository_answers()):",
        new="if is_needed and candidate == self._wanted[-1]:",
        tests=("tests/enumeration/test_reading.py",),
    ),
    Mutation(
        name="a replica is acknowledged before it is checked",
        file=GUESTS,
        old="            try:\n                intake.check()\n",
        new="            try:\n                pass\n",
        tests=_delivered("first"),
    ),
    Mutation(
        name="a replica is sealed when it is offered",
        file=GUESTS,
        old="            self._intakes[record.rank] = intake\n",
        new="            self._intakes[record.rank] = intake\n            intake.publish()\n",
        tests=_delivered("first"),
    ),
    Mutation(
        name="the only whole replica makes room for the next one",
        file=GUESTS,
        old="                if (held.step, held.attempt) != self._global:\n",
        new="                if True:\n",
        tests=_delivered("second"),
    ),
    Mutation(
        name="what arrives in part is sealed",
        file="moc/agent/peers/reception.py",
        old="  # the sender is gone, or stalls\n            self._guests.drop(intake)\n",
        new="\n            self._guests.publish(intake)\n",
        tests=_delivered("first"),
    ),
)
