"""The defects that must not go unnoticed. Each is one change of one file that breaks one promise.

A row names the cheapest tests that find it. The same tests pass on the unchanged copy, see `test_mutations.py`.
"""

from __future__ import annotations

from tests.support.mutant import Mutation

__all__ = ["MUTATIONS"]

LOCAL = "tests/store/test_local.py"
S3 = "tests/store/test_s3.py"
SHARED = "tests/core/test_partial.py"
JOINT = "tests/core/test_joint_saves.py"
KILLED_UPLOAD = "test_a_process_killed_in_an_upload_leaves_nothing_visible_and_the_sweep_takes_the_parts"

MUTATIONS = (
    Mutation(
        name="no-fsync-of-the-file",
        file="moc/store/local.py",
        old="                self._files.fsync(handle)\n",
        new="                pass\n",
        tests=(LOCAL,),
    ),
    Mutation(
        name="no-fsync-of-the-folders",
        file="moc/store/local.py",
        old="            self._tree.sync_directories(key)\n",
        new="",
        tests=(LOCAL,),
    ),
    Mutation(
        name="fsync-of-the-lowest-folder-only",
        file="moc/store/tree.py",
        old="            if directory == self._root:\n                break\n",
        new="            break\n",
        tests=(LOCAL,),
    ),
    Mutation(
        name="no-fsync-above-the-root",
        file="moc/store/tree.py",
        old="            self._sync_above_root()\n",
        new="",
        tests=(LOCAL,),
    ),
    Mutation(
        name="no-fsync-after-a-delete",
        file="moc/store/local.py",
        old="                self._tree.sync_nearest(key)\n                self._tree.remove_empty_directories(key)\n",
        new="                self._tree.remove_empty_directories(key)\n",
        tests=(LOCAL,),
    ),
    Mutation(
        name="manifest-before-the-objects",
        file="moc/repository.py",
        old="""        self.store.put(key, segments)
""",
        new="""        self.__dict__.setdefault("late", []).append((key, [bytes(segment) for segment in segments]))

    def put_manifest(self, manifest: Manifest) -> None:
        self.store.put(manifest_key(manifest.name), [memoryview(encode_manifest(manifest))])
        for key, parts in self.__dict__.pop("late", []):
            self.store.put(key, [memoryview(part) for part in parts])
""",
        tests=("tests/crash/test_spans.py::test_agent_killed_at_every_span_together_with_the_trainers",),
    ),
    Mutation(
        name="seal-before-the-copy",
        file="moc/snapshot/snapshotter.py",
        old="""                self._state.copy_shards(targets, filling.crcs)
            filling.copied.set()
""",
        new="""                self._seal(filling)
                self._state.copy_shards(targets, filling.crcs)
            filling.copied.set()
""",
        tests=("tests/crash/test_spans.py::test_trainer_killed_at_every_span",),
    ),
    Mutation(
        name="free-on-a-local-seal",
        file="moc/plan/freeing.py",
        old="for moment, held in holders.items() if held >= set(ranks)))",
        new="for moment, held in holders.items() if held))",
        tests=("tests/core/test_freeing.py",),
    ),
    Mutation(
        name="recovery-by-the-highest-number",
        file="moc/plan/lineage.py",
        old="    admitted = [c for c in known if is_on_chain(links, c.incarnation, c.step, c.attempt)]\n",
        new="    admitted = []\n    return tuple(sorted(known, key=lambda c: (-c.incarnation, -c.step, c.source)))\n",
        tests=("tests/core/test_lineage.py",),
    ),
    Mutation(
        name="no-crc-after-a-read",
        file="moc/recover.py",
        old="            if actual != row.crc32c:\n",
        new="            if actual is None:\n",
        tests=("tests/crash/test_rot.py",),
    ),
    Mutation(
        name="no-crc-before-a-write",
        file="moc/persist.py",
        old="        arena.check(record, units)\n",
        new="",
        tests=("tests/crash/test_rot.py",),
    ),
    Mutation(
        name="commit-without-a-look-for-newer-lives",
        file="moc/commit.py",
        old="        refuse_if_fenced(repository, name.run, name.incarnation)\n        condemned =",
        new="        condemned =",
        tests=("tests/crash/test_lineage.py::test_a_rewind_during_training_fences_the_saves_of_the_life_that_goes_on",),
    ),
    Mutation(
        name="client-libraries-repeat-too",
        file="moc/store/s3.py",
        old="    files.retries = 1\n",
        new="",
        tests=(f"{S3}::test_one_layer_repeats_and_not_three",),
    ),
    Mutation(
        name="create-only-without-a-look",
        file="moc/store/remote.py",
        old="            is_free = self._properties.create_only or not self._is_there(files, path)\n",
        new="            is_free = True\n",
        tests=(f"{S3}::test_an_endpoint_from_around_the_process_does_not_weaken_the_fence",),
    ),
    Mutation(
        name="a-bucket-without-rights-is-empty",
        file="moc/store/remote.py",
        old="            return self._is_there(files, self._base)\n",
        new="            return bool(files.exists(self._base))\n",
        tests=(f"{S3}::test_what_must_exist_is_not_missing_because_one_may_not_look",),
    ),
    Mutation(
        name="a-listing-that-is-not-found-is-empty",
        file="moc/store/remote.py",
        old="            if self._is_s3 or class_for_remote(error)",
        new="            if class_for_remote(error)",
        tests=("tests/store/test_faults.py::test_a_missing_answer_that_stays_is_neither_success_nor_an_empty_store",),
    ),
    Mutation(
        name="no-look-at-the-stored-length",
        file="moc/store/remote.py",
        old="        if stored_bytes != len(content):\n",
        new="        if stored_bytes is None:\n",
        tests=("tests/store/test_remote.py::test_a_put_is_only_done_when_the_stored_length_is_right",),
    ),
    Mutation(
        name="uploads-of-neighbours-are-aborted",
        file="moc/store/s3.py",
        old='Prefix=f"{key}/" if key else ""',
        new="Prefix=key",
        tests=(f"{S3}::{KILLED_UPLOAD}",),
    ),
    Mutation(
        name="uploads-under-way-are-aborted",
        file="moc/store/s3.py",
        old="""            if row["Initiated"] < begun_before\n""",
        new="",
        tests=(f"{S3}::{KILLED_UPLOAD}",),
    ),
    Mutation(
        name="the-rotation-advances-with-attempts-instead-of-commits",
        file="moc/plan/composition.py",
        old="        history = History(commits=numbers[base.name], "
        "last=(tuple(numbers[held[e].source] for e in experts),))\n",
        new="        turn = step // terms.interval % len(order)\n"
        "        order = (*order[turn:], *order[:turn])\n"
        "        history = History(commits=0, last=((0,) * len(order),))\n",
        tests=("tests/core/test_partial_saves.py::test_a_save_that_failed_advances_nothing",),
    ),
    Mutation(
        name="a-rewound-life-grows-from-what-was-given-up",
        file="moc/agent/composer.py",
        old="            if name.run == self._life.run "
        "and is_on_chain(links, name.incarnation, name.step, name.attempt)\n",
        new="            if name.run == self._life.run\n",
        tests=(
            "tests/core/test_partial_saves.py::test_a_life_that_goes_back_shares_nothing_with_what_it_has_given_up",
        ),
    ),
    Mutation(
        name="superseded-shards-are-read",
        file="moc/format/contents.py",
        old="if _version(manifest, stored.shard.expert)[0] == owner)\n",
        new=")\n",
        tests=(f"{SHARED}::test_each_element_of_the_model_is_live_once",),
    ),
    Mutation(
        name="a-round-condemns-what-an-unreadable-manifest-shares",
        file="moc/gc.py",
        old="        condemned = {key for key in condemned if not _may_be_named(key, unreadable)}\n",
        new="",
        tests=(f"{SHARED}::test_retention_keeps_what_a_manifest_may_name_that_cannot_be_read",),
    ),
    Mutation(
        name="a-round-deletes-what-an-unreadable-manifest-shares",
        file="moc/gc.py",
        old='owner == name or (piece != "d" and is_earlier(owner, name))',
        new="owner == name",
        tests=(f"{SHARED}::test_retention_keeps_what_a_manifest_may_name_that_cannot_be_read",),
    ),
    Mutation(
        name="experts-of-an-abandoned-future-are-sound",
        file="moc/verify.py",
        old="    findings += _source_findings(repository, manifest)\n",
        new="",
        tests=(f"{SHARED}::test_experts_of_an_abandoned_future_are_found",),
    ),
    Mutation(
        name="nodes-compose-from-the-oldest-commit-that-any-knows",
        file="moc/plan/offers.py",
        old="        base=max((offer.base for",
        new="        base=min((offer.base for",
        tests=("tests/plan/test_offers.py::test_the_newest_base_counts_and_whatever_anybody_knows_to_be_finite",),
    ),
    Mutation(
        name="a-successor-writes-another-composition-over-its-predecessor's",
        file="moc/agent/peers/council.py",
        old="        if differing:\n",
        new="        if False:\n",
        tests=("tests/core/test_council.py::test_a_node_composes_nothing_else_than_another_one_has_composed",),
    ),
    Mutation(
        name="contributions-to-different-compositions-are-committed",
        file="moc/agent/persister.py",
        old="        if any(other != composed.digest for other in digests):\n",
        new="        if False:\n",
        tests=(f"{JOINT}::test_contributions_to_different_checkpoints_fail_the_save",),
    ),
    Mutation(
        name="two-committers-with-differing-parents",
        file="moc/agent/persister.py",
        old="        if any(other != parent for other in parents):\n",
        new="        if False:\n",
        tests=(f"{JOINT}::test_contributions_that_grow_from_different_commits_fail_the_save",),
    ),
    Mutation(
        name="what-a-life-was-recovered-from-is-kept-by-no-host",
        file="moc/agent/guests.py",
        old="        if rank not in kept or kept[rank][-1] != index:\n",
        new="        if True:\n",
        tests=("tests/peers/test_delivery.py::test_a_new_life_keeps_what_it_grew_from_until_it_is_global_itself",),
    ),
    Mutation(
        name="a-later-checkpoint-of-the-step-is-not-looked-at",
        file="moc/layers.py",
        old="            or (is_taken_again and ",
        new="            or (False and ",
        tests=("tests/core/test_assembly.py",),
    ),
    Mutation(
        name="the-oldest-version-of-an-expert-is-chosen",
        file="moc/plan/versions.py",
        old="            (-layer[expert].step, number)\n",
        new="            (layer[expert].step, number)\n",
        tests=("tests/core/test_versions.py",),
    ),
    Mutation(
        name="a-wish-means-the-first-checkpoint-of-its-moment",
        file="moc/agent/peers/report.py",
        old="second_attempt(attempt) if self.is_second else attempt",
        new="attempt",
        tests=(f"{JOINT}::test_an_agent_that_leaves_has_the_other_one_make_a_second_checkpoint_of_its_newest_moment",),
    ),
    Mutation(
        name="what-other-nodes-are-at-falls-behind-what-was-skipped",
        file="moc/agent/saves.py",
        old="if verdict.moment in asked] + found",
        new="if False] + found",
        tests=(f"{JOINT}::test_how_a_save_has_ended_is_told_to_who_is_at_it_however_many_were_skipped_since",),
    ),
    Mutation(
        name="an-expert-is-whole-where-those-who-are-left-agree",
        file="moc/plan/versions.py",
        old="    return len(told) < len(slices) or sum(told) == size\n",
        new="    return True\n",
        tests=("tests/core/test_versions.py",),
    ),
    Mutation(
        name="the-newest-commits-snapshot-is-freed",
        file="moc/agent/custody.py",
        old="for key in (lacking, base) if",
        new="for key in (lacking,) if",
        tests=("tests/core/test_joint_custody.py",),
    ),
)
