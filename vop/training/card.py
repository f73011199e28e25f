"""The model card that lies beside a trained encoder: what it is, what it saw, how good it was."""

LINE = "| {} | {} |"


def card_rows(noted: dict) -> list[tuple[str, str]]:
    """What the card says of an encoder: label and text.

    noted: what `vop.steps.training` notes of a training (the `trained_with` of the encoder's config.json).
    """
    backbone, data, train = noted["backbone"], noted["data"], noted["train"]
    radius = noted["radius"]
    block = f", block {backbone['block']}" if "block" in backbone else ""
    validated = f"{data['validation_images']} other images of {data['validation_scenes']} scenes"
    return [
        ("backbone", f"{backbone['name']}{block}, weights {backbone['weights_sha256'][:12]}"),
        ("descriptor", f"{train['descriptor_dim']} numbers for each of the patches of 14 pixels"),
        ("trained on", f"{data['training_images']} images of {data['training_scenes']} scenes, from {data['source']}"),
        ("licence of these images", data["licence"] or "not stated by who trained it: ask before you publish it"),
        ("supervision", train["supervision"]),
        ("validated on", validated if data["validation_images"] else "nothing"),
        ("radius of the votes", "0.2, not chosen by any validation" if radius is None else f"{radius:g}"),
        ("steps", f"{noted['steps']}, the weights are those after step {noted['best_step']}"),
    ]


def model_card(noted: dict) -> str:
    """The card as Markdown; `noted` as in `card_rows`."""
    scores = [(name, f"{value:.4f}") for name, value in noted["metrics"].items()]
    table = "\n".join(LINE.format(*row) for row in [("", ""), ("---", "---"), *card_rows(noted)])
    judged = "\n".join(LINE.format(*row) for row in [("score of the validation", ""), ("---", "---"), *scores])
    return (
        "# Overlap encoder\n\nTurns the patch tokens of a frozen backbone into descriptors whose similarity predicts "
        "which images see the same (Wei et al., Breaking the Frame, WACV 2025). Use it with that backbone only:\n\n"
        f"    vop register images=... backbone={noted['backbone']['name']} encoder=THIS_FOLDER "
        f"retrieval.radius={noted['radius'] or 0.2:g}\n\n{table}\n"
        + (f"\n{judged}\n" if scores else "\nIt was not validated.\n")
        + "\n`precision`: of the patches with a match in another image, the share whose nearest descriptor there is "
        "that match or beside it. `recall@k`: images that find one they overlap with among the first k.\n"
    )
