"""From what a report shows to the text of its page: the templates, and how numbers are said in them."""

import jinja2

QUARANTINE_SHOWN = 200


def rendered(template: str, report: object, **values: object) -> str:
    """The page of a report by a template of this folder that extends `page.html`; equal reports give equal text.

    Args:
        report: has title, summary, quarantined, timings, config_yaml and versions as `vop.viz.report.Report` has them,
            and what the template looks for.
        values: what else the template is given.

    Everything is escaped but what is `Markup`. Raises `jinja2.UndefinedError` for a name that the template misses.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vop", "viz"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(
        report=report,
        quarantine_shown=QUARANTINE_SHOWN,
        total_seconds=sum(seconds for _, seconds in report.timings),
        duration=duration,
        **values,
    )


def duration(seconds: float) -> str:
    """Seconds as a person says them: 0.25 s, 12.3 s, 4 min 05 s, 2 h 03 min."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
