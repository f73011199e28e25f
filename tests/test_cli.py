import subprocess
import sys

import pytest

import vop
from vop import cli, config


def output_of(capsys, *arguments):
    """Exit status, standard output and standard error of a command."""
    try:
        status = cli.main([str(argument) for argument in arguments])
    except SystemExit as left:
        status = left.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_help_names_every_command_and_every_key(capsys):
    status, out, _ = output_of(capsys, "--help")
    assert status == 0
    for command in cli.COMMANDS:
        assert command in out
    for command in cli.COMMANDS:
        status, out, _ = output_of(capsys, command, "--help")
        assert status == 0
        for key, meaning, _ in config.documented():
            assert f"  {key}=" in out, key
            assert meaning in out, key
        assert f"  retrieval.k={config.Config().retrieval.k}\n" in out
        assert "  cluster.cpus=null\n" in out
        assert "  retrieval.mask_padding=true\n" in out


def test_every_command_is_a_function_of_the_package():
    from vop import pipeline

    for command in cli.COMMANDS:
        name = command.replace("-", "_")
        assert callable(getattr(pipeline, name)), command
        assert f"vop {command}" in getattr(vop, name).__doc__


def test_the_functions_take_files_and_the_same_keys(tmp_path):
    (tmp_path / "a.yaml").write_text("retrieval: {k: 0}\n")
    for files in (str(tmp_path / "a.yaml"), [str(tmp_path / "a.yaml")]):
        with pytest.raises(config.ConfigError, match=r"retrieval\.k is 0"):
            vop.register(config=files, images="photos")
        with pytest.raises(config.ConfigError, match=r"report\.matches is 0"):  # the file's k is overruled
            vop.register(config=files, retrieval={"k": 1}, report={"matches": 0})
    with pytest.raises(config.ConfigError, match="did you mean 'images'"):
        vop.embed(imges="photos")


def test_a_dry_run_prints_what_would_run_and_loads_back(capsys, tmp_path):
    status, out, err = output_of(
        capsys, "register", "--dry-run", f"images={tmp_path}/photos", "retrieval.k=7", "retrieval.shortlist=null"
    )
    assert (status, err) == (0, "")
    (tmp_path / "config.yaml").write_text(out)
    expected = config.load(images=f"{tmp_path}/photos", retrieval={"k": 7, "shortlist": None})
    assert config.load([str(tmp_path / "config.yaml")]) == expected
    assert not (tmp_path / "photos").exists()


def test_files_then_overrides_in_any_place(capsys, tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("retrieval: {k: 1, query_batch: 5}\noutput: /a\n")
    second.write_text("retrieval: {k: 2}\n")
    for arguments in (
        ("--config", first, second, "output=/c", "--dry-run"),
        ("output=/c", "--config", first, "--config", second, "--dry-run"),
        ("--dry-run", "output=/c", "--config", first, second),
    ):
        status, out, _ = output_of(capsys, "embed", *arguments)
        assert status == 0
        assert "k: 2\n" in out
        assert "query_batch: 5\n" in out
        assert "output: /c\n" in out
    status, out, _ = output_of(capsys, "embed", "--config", second, first, "--dry-run", "retrieval.query_batch=9")
    assert status == 0
    assert "k: 1\n" in out
    assert "query_batch: 9\n" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["retrieval.shortlst=5"], "unknown key 'retrieval.shortlst'; did you mean 'retrieval.shortlist'?"),
        (["retrieval.k=0"], "retrieval.k is 0, but must be greater than 0"),
        (["photos"], "'photos' is not an override: write key=value"),
        (["--config", "nowhere.yaml"], "config file 'nowhere.yaml' does not exist"),
    ],
)
def test_what_cannot_be_asked_is_status_2(capsys, arguments, said):
    status, out, err = output_of(capsys, "embed", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("vop: ")
    assert said in err
    assert len(err.splitlines()) == 1


def test_a_command_that_does_not_exist_is_status_2(capsys):
    status, _, err = output_of(capsys, "regster")
    assert status == 2
    assert "register" in err


def test_too_little_to_work_on_is_status_2(capsys, tmp_path, local_ray):
    for command, said in (
        ("register", "register needs images=FOLDER"),
        ("retrieve", "retrieve needs queries=FOLDER and database=FOLDER"),
        ("embed", "no images: give images=FOLDER"),
    ):
        status, out, err = output_of(capsys, command, f"output={tmp_path}/run")
        assert (status, out) == (2, "")
        assert said in err
    assert not (tmp_path / "run" / "store").exists()


def test_images_that_are_not_there_are_status_3_and_one_line(capsys, tmp_path, local_ray):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "notes.md").touch()
    for images, said in ((tmp_path / "photos", "no images in"), (tmp_path / "nowhere", "does not exist")):
        status, out, err = output_of(capsys, "register", f"images={images}", f"output={tmp_path}/run")
        assert (status, out) == (3, "")
        assert err.startswith("vop register failed: ")
        assert said in err
        assert len(err.splitlines()) == 1


def test_a_report_of_no_run_says_so(capsys, tmp_path):
    status, _, err = output_of(capsys, "report", f"output={tmp_path}/run")
    assert status == 2
    assert f"{tmp_path}/run" in err
    assert "Traceback" not in err


def test_as_a_program_a_dry_run_needs_neither_ray_nor_torch():
    code = (
        "import sys; from vop import cli; cli.main(['embed', '--dry-run']); "
        "print({'ray', 'torch', 'faiss'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
