"""The lines of a summary about localized queries and reconstructed models."""


def mapped(job) -> list[str]:
    """The map that a run localized by."""
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


def localized(job) -> list[str]:
    """How many queries have a pose, why others have none, and how right the poses are."""
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


def reconstructed(job) -> list[str]:
    """The models of a run, and why images are in none."""
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
