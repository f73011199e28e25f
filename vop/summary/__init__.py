"""The summary of a run: what happened, for a person."""

from vop.summary import geometry

QUARANTINE_SHOWN = 10  # lines of the summary


def text(job) -> str:
    """What happened in a run (`vop.run.Run`), for a person."""
    counts = job.counts
    lines = [f"vop {job.command}: done in {job.timings.get('total', 0):.1f} s"]
    if job.command == "train":
        lines += _tokens(job)
    elif "images" in counts:
        lines.append(
            f"  images       {counts['images']} in the store ({counts['embedded_now']} embedded by this run, "
            f"{counts['added']} new, {counts['changed']} changed), {counts['quarantined']} in quarantine"
        )
    for name, reason in job.quarantined[:QUARANTINE_SHOWN]:
        lines.append(f"                 {name}: {reason}")
    if len(job.quarantined) > QUARANTINE_SHOWN:
        lines.append(f"                 ... and {len(job.quarantined) - QUARANTINE_SHOWN} more in images.parquet")
    if counts.get("vanished"):
        lines.append(f"  gone         {counts['vanished']} images of the store are no longer in the collection")
    for reason, number in counts.get("skipped", {}).items():
        lines.append(f"  skipped      {number} {reason}")
    if "pairs" in counts:
        lonely = counts["queries"] - counts["queries_with_pairs"]
        lines.append(
            f"  pairs        {counts['pairs']} for {counts['queries']} queries ({counts['searched_now']} searched "
            f"by this run), {lonely} without any, radius {counts['radius']:g}"
        )
    if counts.get("seconds_per_batch"):
        lines.append(_search(job))
    lines += _graph(job)
    if "pairs_txt" in counts:
        lines.append(f"  pairs.txt    {counts['pairs_txt']}")
    if "exported" in counts:
        lines.append(f"  file         {counts['h5']} ({counts['exported']} images, {counts['cameras']} with cameras)")
    lines += _judgement(job)
    lines += _matches(job)
    lines += _imported(job)
    lines += geometry.mapped(job)
    lines += _poses(job)
    lines += geometry.localized(job)
    lines += geometry.reconstructed(job)
    lines += _exports(job)
    lines += _training(job)
    steps = ", ".join(f"{step} {seconds:.1f}" for step, seconds in job.timings.items() if step != "total")
    lines.append(f"  seconds      {steps}")
    if job.command not in ("export-h5", "export-matches"):
        lines.append(f"  output       {job.output}")
    if job.report:
        lines.append(f"  report       {job.report}")
    return "\n".join(lines)


def _graph(job) -> list[str]:
    lines, counts = [], job.counts
    if "pair_list" in counts:
        listed = dict(counts["pair_list"])
        total, short = listed.pop("pairs"), listed.pop("to_connect") - listed["forest"]
        sources = ", ".join(f"{number} {source}" for source, number in listed.items())
        lack = f"; {short} more would connect all that can be connected" if short > 0 else ""
        lines.append(f"  pair list    {total} pairs chosen: {sources}{lack}")
    if "components" in counts:
        share = counts["largest_component"] / counts["queries"]
        lines.append(
            f"  scenes       {counts['components']} (connected components), the largest with {share:.1%} of the "
            f"images; {counts['singletons']} images alone"
        )
    if "positions" in counts:
        lines.append(f"  positions    known of {counts['positions']} images")
    return lines


def _search(job) -> str:
    counts = job.counts
    seconds = ", ".join(f"{name} {value:.2g}" for name, value in counts["seconds_per_batch"].items())
    busy = counts["shard_seconds"]
    shards = f"{len(busy)} shards busy {min(busy):.3g} to" if len(busy) > 1 else "one shard busy"
    return (
        f"  search       {counts['pairs_scored']} pairs of images scored, {counts['pairs_known']} known from their "
        f"other side or an earlier run; seconds a batch: {seconds}; {shards} {max(busy):.3g} s"
    )


def _matches(job) -> list[str]:
    counts = job.counts
    if "pairs_matched" not in counts:
        return []
    return [
        f"  features     of {counts['images_with_features']} images ({counts['extracted_now']} by this run)",
        f"  matches      of {counts['pairs_matched']} unordered pairs ({counts['matched_now']} by this run)",
        *(f"                 {number} pairs not matched: {why}" for why, number in counts["pairs_unmatched"].items()),
    ]


def _imported(job) -> list[str]:
    counts = job.counts
    if "pairs_imported" not in counts:
        return []
    left_out = [(counts["images_not_in_files"], "images of the collection have no features in the files"),
                (counts["not_in_collection"], "images of the files are not in the collection"),
                *((number, f"pairs of the files: {why}") for why, number in counts["pairs_not_imported"].items()),
                (counts["pairs_failed"], "pairs whose matches do not fit (receipts of the store say why)")]  # fmt: skip
    return [
        f"  features     of {counts['images_with_features']} images ({counts['imported_now']} by this run)",
        f"  matches      of {counts['pairs_imported']} unordered pairs ({counts['pairs_imported_now']} by this run)",
        *(f"  left out     {number} {what}" for number, what in left_out if number),
        f"  use          matching.method=imported features={counts['features']} matches={counts['matches']}",
    ]


def _poses(job) -> list[str]:
    counts, scores = job.counts, job.metrics
    if "pairs_without_pose" not in counts:
        return []
    lines = [f"  no pose      {number} pairs: {why}" for why, number in counts["pairs_without_pose"].items()]
    beside = f"; {scores['left_out']} more have no known intrinsics" if scores["left_out"] else ""
    if not scores["judged"]:
        found = scores["unjudged"] - scores["unposed"]
        return [
            *lines,
            f"  relative poses of {found} of {scores['unjudged']} queries were estimated{beside}",
            "    nothing could be judged: no true pose is known, or none with a baseline",
        ]
    if scores["unjudged"]:
        beside = f"; {scores['unjudged']} more cannot be judged for want of a true pose{beside}"
    area = ", ".join(f"AUC@{degrees} {100 * scores[f'auc@{degrees}']:.1f}" for degrees in (5, 10, 20))
    choice = "pair with most inliers" + (f" of the first {scores['k']}" if scores["k"] else "")
    choice = "first pair" if scores["k"] == 1 else choice
    return [
        *lines,
        f"  relative poses of {scores['judged']} queries judged: {scores['failed']} without one, "
        f"{scores['unrelated']} with one between scenes{beside}",
        f"    {area} (percent; protocol {scores['protocol']}, {scores['estimator']}, "
        f"{scores['threshold_px']:g} px, by the {choice})   all in results.md",
    ]


def _tokens(job) -> list[str]:
    counts = job.counts
    if "images" not in counts:
        return []
    now = counts["embedded_now"]
    return [f"  tokens       of {counts['images']} views of images ({now} computed by this run), "
            f"{counts['quarantined']} in quarantine"]  # fmt: skip


def _training(job) -> list[str]:
    counts, scores = job.counts, job.metrics
    lines = [
        f"  left out     {number} images: {why}" for why, number in counts.get("images_without_overlap", {}).items()
    ]
    if "pairs_labelled" in counts:
        validated = f", {counts['validation_pairs']} for the validation" if counts["validation_pairs"] else ""
        lines += [
            f"  labels       of {counts['pairs_labelled']} pairs: {counts['pairs_of_an_epoch']} in an "
            f"epoch{validated}",
            *(f"                 {number} pairs left out: {why}"
              for why, number in counts["pairs_without_labels"].items()),
        ]  # fmt: skip
    if "steps" in counts:
        lines.append(f"  steps        {_steps(job)}")
        found = [f"{name} {scores[name]:.1%}" for name in ("precision", "recall@1", "recall@5") if name in scores]
        if "validation_loss" in scores:
            found.append(f"loss {scores['validation_loss']:.4f}")
        if counts.get("tensorboard") is False:
            lines.append("               not in TensorBoard: no extra `train`, or the output is in a bucket")
        told = ", ".join(found) or "none: what the last step left is kept (train.validation=FILE)"
        lines.append(f"  validation   {told}")
        lines.append(f"  encoder      {counts['encoder']}: beside model.safetensors a README.md, its model card")
        lines.append(f"               vop register images=DIR output=DIR {counts['use']}")
    return lines


def _steps(job) -> str:
    steps, now = job.counts["steps"], job.counts["steps_now"]
    done = f"{steps} ({now} by this run)" if now else f"{steps}, all of them done before (more: train.epochs)"
    return f"{done}, kept: the weights after step {job.metrics['best_step']}"


def _exports(job) -> list[str]:
    counts, lines = job.counts, []
    if "hloc" in counts:
        written = counts["hloc"]
        lines.append(f"  hloc         {written['path']} (features of {written['images']} images, matches of "
                     f"{written['pairs']} pairs)")  # fmt: skip
    if "colmap" in counts:
        written = counts["colmap"]
        cameras = ", ".join(f"{number} {source}" for source, number in written["cameras"].items())
        lines.append(f"  COLMAP       {written['path']} ({written['images']} images, {written['pairs']} pairs, "
                     f"{written['verified']} of them verified)")  # fmt: skip
        lines.append(f"               cameras of images: {cameras}")
    if counts.get("pairs_left_out"):
        lines.append(f"  left out     {counts['pairs_left_out']} pairs of the run that have no matches")
    return lines


def _judgement(job) -> list[str]:
    scores = job.metrics
    if "precision@1" not in scores:
        return []
    lines = [
        f"  against the known overlaps (at least {scores['min_overlap']:.0%}; {scores['queries']:.0f} queries "
        f"that have any; a random ranking has precision {scores['chance']:.2f}):"
    ]
    for k in (1, 5, 10):
        lines.append(
            f"    first {k:<2}   precision {scores[f'precision@{k}']:.3f} (at best {scores[f'ceiling@{k}']:.3f})"
            f"   recall of true pairs {scores[f'pair_recall@{k}']:.3f}"
        )
    return lines
