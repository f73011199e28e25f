"""The summary of a run: what happened, for a person."""

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
    lines += _map(job)
    lines += _poses(job)
    lines += _localized(job)
    lines += _reconstruction(job)
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


def _map(job) -> list[str]:
    if "map" not in job.counts:
        return []
    held = job.counts["map"]
    worlds = f" in {held['worlds']} worlds" if held["worlds"] > 1 else ""
    lines = [
        f"  map          {held['points']} points{worlds} seen by {held['images']} database images "
        f"({held['triangulated_now']} triangulated by this run), {held['without_points']} of them see none",
        f"                 from {held['pairs_matched']} pairs by {' and '.join(held['pairs_by'])} "
        f"({held['matched_now']} matched, features of {held['extracted_now']} images found by this run)",
    ]
    return lines + [f"                 {number} images take no part: {why}" for why, number in held["left_out"].items()]


def _localized(job) -> list[str]:
    counts, scores = job.counts, job.metrics
    if "queries_without_pose" not in counts:
        return []
    lines = []
    if counts.get("database_without_pose"):
        lines.append(
            f"  left out     {counts['database_without_pose']} database images without a known camera and pose"
        )
    if counts.get("database_without_geometry"):
        lines.append(f"  left out     {counts['database_without_geometry']} database images without 3D points")
    if "intrinsics" in counts:
        listed = counts["intrinsics"]
        beside = f"; {listed['unknown']} more are of no query" if listed["unknown"] else ""
        lines.append(f"  intrinsics   of {listed['listed']} queries are listed{beside}")
    lines.append(
        f"  localized    {scores['localized']} of {scores['queries']} queries ({counts['localized_now']} tried by "
        f"this run)" + (f", median of {scores['median_inliers']:g} inliers" if scores["localized"] else "")
    )
    lines += [
        f"                 {number} without a pose: {why}" for why, number in counts["queries_without_pose"].items()
    ]
    lines += [
        f"                 {number} pairs without 3D points: {why}"
        for why, number in counts["pairs_without_points"].items()
    ]
    if not scores["judged"]:
        lines.append(f"    {scores['unjudged']}")
    else:
        lines += _pose_errors(scores)
    lines.append(f"  poses.txt    {counts['poses_txt']}" + (" poses" if isinstance(counts["poses_txt"], int) else ""))
    return lines


def _pose_errors(scores: dict) -> list[str]:
    """Medians and recalls of the queries whose true pose is known; those without a pose count as infinitely wrong."""
    middle = (scores["median_translation_error"], scores["median_rotation_error"])
    medians = (
        "infinite, as half of them or more failed" if None in middle else f"{middle[0]:.4g} m, {middle[1]:.3g} deg"
    )
    wrong = f"; {scores['wrong_world']} in a wrong world" if scores["wrong_world"] else ""
    recalls = [f"({key.split('@')[1].replace('_', ', ').replace('deg', ' deg').replace('m,', ' m,')}) {value:.1%}"
               for key, value in scores.items() if key.startswith("recall@") and "m_" in key]  # fmt: skip
    return [
        f"    against {scores['judged']} true poses: median error {medians}{wrong} (metres: units of the world)",
        *(f"      within {', '.join(recalls[start : start + 3])}" for start in range(0, len(recalls), 3)),
    ]


def _reconstruction(job) -> list[str]:
    counts = job.counts
    if "pairs_used" not in counts:
        return []
    cameras = ", ".join(f"{number} {source}" for source, number in counts["cameras"].items())
    lines = [
        f"  cameras      {cameras}",
        f"  verified     {counts['pairs_used']} of {counts['pairs_matched']} pairs take part",
        *(f"                 {number} pairs left aside: {why}" for why, number in counts["pairs_left_aside"].items()),
        f"  registered   {counts['images_registered']} of {counts['images_of_collection']} images in "
        f"{len(counts['models'])} models",
    ]
    for model in counts["models"]:
        lines.append(
            f"    models/{model['model']:<3} {model['images']} images, {model['points']} points, reprojection error "
            f"{model['reprojection_error']:.2f} px, tracks of {model['track_length']:.1f} images"
        )
        if model["world"] is not None:
            lines.append(f"               {_model_judged(model)}")
    for why, number in counts["images_not_registered"].items():
        lines.append(f"                 {number} images not registered: {why}")
    return lines


def _model_judged(model: dict) -> str:
    mixed = f", {model['foreign']} images of other worlds" if model["foreign"] else ""
    held = f"{model['images_of_world']} images of {model['world'] or 'the one world'}{mixed}"
    if model["largest_error"] is None:
        return f"{held}: too few cameras to align"
    worst, median = model["largest_error"], model["median_error"]
    return f"{held}: cameras off by at most {worst:.2%} of the scene, median {median:.2%}"


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
