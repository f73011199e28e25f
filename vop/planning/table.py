"""A plan for people: one table, the bottleneck and what removes it, what was assumed."""

from collections.abc import Sequence

from vop.planning import changes
from vop.planning.plan import Limit, Plan
from vop.planning.stages import Stage

COLUMNS = (
    *("stage", "time", "GPU-h", "shards", "actors", "RAM each", "disk"),
    *("read", "written", "requests", "waits for"),
)
SHOWN = 3  # changes


def page(plan: Plan) -> str:
    """All that a plan says."""
    lines = [_asked(plan), "", *_table(plan), "", *_where_the_time_goes(plan), ""]
    lines += [*_refusal(plan), ""] if plan.limits else []
    return "\n".join([*lines, *_bottleneck(plan), "", *_assumed(plan)])


def _asked(plan: Plan) -> str:
    work, machines, config = plan.work, plan.machines, plan.config
    job = f"register {work.images:,} images" if work.register else (
        f"rank {work.database:,} images for each of {work.queries:,} queries")  # fmt: skip
    cards = f", {machines.gpus} cards" if machines.gpus else ""
    nodes = f"{machines.nodes} nodes" if machines.nodes > 1 else "one node"
    return (
        f"{job} ({config.backbone}, {work.rates.patches} patches of {work.width} {config.embedding.dtype}) on {nodes} "
        f"with {machines.cpus} cores{cards} and {machines.memory_bytes / 1e9:,.3g} GB"
    )


def _table(plan: Plan) -> list[str]:
    rows = [COLUMNS, *(_row(stage) for stage in plan.stages)]
    hours = sum(stage.cards * stage.seconds for stage in plan.stages) / 3600
    traffic = [stage.traffic for stage in plan.stages]
    rows.append(
        ("all", duration(plan.seconds), f"{hours:.3g}" if hours else "", "", "", "", size(plan.disk),
         *(size(sum(getattr(one, name) for one in traffic)) for name in ("read", "written")),
         _number(sum(one.requests for one in traffic)), "")
    )  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    left = {0, 4, len(COLUMNS) - 1}
    return [
        "  ".join(cell.ljust(width) if i in left else cell.rjust(width)
                  for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]  # fmt: skip


def _row(stage: Stage) -> tuple[str, ...]:
    longest = max(stage.parts, key=lambda part: part.seconds)
    hours = stage.cards * stage.seconds / 3600
    return (
        stage.name,
        duration(stage.seconds),
        f"{hours:.3g}" if hours else "",
        f"{stage.shards:,}" if stage.shards else "",
        f"{stage.actors:,} {stage.role}" if stage.actors else "",
        size(stage.actor_bytes) if stage.actor_bytes else "",
        size(stage.disk) if stage.disk else "",
        size(stage.traffic.read) if stage.traffic.read else "",
        size(stage.traffic.written) if stage.traffic.written else "",
        _number(stage.traffic.requests) if stage.traffic.requests else "",
        longest.name,
    )


def _where_the_time_goes(plan: Plan) -> list[str]:
    """Every part with its arithmetic; `|` marks those that run together, of which the slowest counts."""
    lines = []
    for stage in plan.stages:
        for part in (*stage.serial, *stage.together):
            beside = part in stage.together
            mark = "|" if beside else " "
            lines.append(f"  {stage.name:<7}{mark} {part.name:<18} {duration(part.seconds):>9} = {part.how}")
    work = plan.work
    lines.append(
        f"  the driver, one process, needs {size(work.driver_bytes)} of memory, {size(work.rates.driver_bytes)} for "
        "each image of the catalog"
    )
    listed, scored = work.queries * work.candidates, work.pairs_scored
    others = ": the others are known from their other side" if scored < listed else ""
    lines.append(f"  {listed:,} pairs are listed, {scored:,} of them scored{others}")
    return lines


def _bottleneck(plan: Plan) -> list[str]:
    """The part that takes longest; where that is a start, what removes the next one that more images make longer."""
    stage, part = plan.bottleneck()
    lines = [f"first bottleneck: {stage.name}, {part.name}: {duration(part.seconds)} of {duration(plan.seconds)}"]
    if part.once:
        grown, part = plan.bottleneck(scaling=True)
        lines[0] += ", whatever the number of images"
        lines.append(f"of what grows with them: {grown.name}, {part.name}: {duration(part.seconds)}")
    found = changes.cheapest(plan)
    if not found:
        return [*lines, "no setting and no machine more would make it much faster"]
    lines += _changes("cheapest change", plan, found)
    chain = changes.chain(plan)
    if len(chain) > 1:
        steps = ", ".join(f"{change.label} ({duration(change.plan.seconds)})" for change in chain)
        lines.append(f"one after the other, the cheapest each time: {steps}; then waits for "
                     f"{chain[-1].plan.bottleneck()[1].name}")  # fmt: skip
    return lines


def _changes(title: str, plan: Plan, found: Sequence[changes.Change]) -> list[str]:
    unit = "" if plan.priced else " machine-hours"
    lines = []
    for change in found[:SHOWN]:
        then, waits = change.plan, change.plan.bottleneck()[1].name
        price = f" ({change.price})" if change.price else ""
        lines.append(
            f"  {change.label}: {duration(plan.seconds)} -> {duration(then.seconds)}, bill {plan.bill:,.3g} -> "
            f"{change.bill:,.3g}{unit}, then waits for {waits}{price}"
        )
    return [f"{title}:", *lines]


def _refusal(plan: Plan) -> list[str]:
    lines = ["this does not fit:", *(f"  {_limit(limit)}" for limit in plan.limits)]
    found = changes.remedies(plan)
    if not found:
        return [*lines, "no single change makes it fit: combine smaller descriptors with more or larger machines"]
    return [*lines, *_changes("it fits with", plan, found)]


def _limit(limit: Limit) -> str:
    shown = size if limit.unit == "bytes" else (lambda number: f"{number:,.0f} {limit.unit}")
    return f"{limit.what}: {shown(limit.needed)} needed, {shown(limit.there)} there"


def _assumed(plan: Plan) -> list[str]:
    rates, asked = plan.work.rates, plan.config.plan
    where = f"in {asked.rates}" if asked.rates else "here"
    stated = [f"plan.{name}={getattr(asked, name):g}" for name in ("forward_images_per_s", "votes_pairs_per_s")
              if getattr(asked, name) is not None]  # fmt: skip
    lines = [
        f"measured {where}, {rates.cores} cores, {rates.measured_images} images of {rates.image_bytes / 1e3:,.0f} kB: "
        f"decode {1e3 * rates.decode_s:.3g} ms, {rates.device} model {1e3 * rates.forward_s:.3g} ms, write "
        f"{1e3 * rates.write_s:.3g} ms/MB, a pair {1e6 * rates.pair_s:.3g} us, a message {1e3 * rates.message_s:.2g} ms"
    ]
    lines.append(
        "assumed: the cluster's cores are like these"
        + (f"; stated: {', '.join(stated)}" if stated else "")
        + f"; {asked.network_gbit:g} Gbit/s a node"
        + (f"; {asked.request_ms:g} ms a request" if asked.storage == "object" else "; a disk as fast as this one")
        + "; nothing else runs there"
    )
    return lines


def duration(seconds: float) -> str:
    """For people."""
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.3g} {unit}" if seconds < 1000 * length else f"{seconds / length:,.0f} {unit}"
    return f"{seconds:.3g} s" if seconds >= 0.01 or not seconds else f"{1e3 * seconds:.2g} ms"


def size(count: float) -> str:
    """Bytes for people."""
    for unit, scale in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def _number(count: float) -> str:
    return f"{count:,.0f}" if count < 1e6 else f"{count:.2e}".replace("e+0", "e")
