"""Plans: arithmetic against numbers done by hand, sizes against files, rates and pairs against a real small job."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pytest

from vop import cli, config, files, pipeline
from vop.config import ConfigError
from vop.planning import calibration, changes, plan, stages, table
from vop.planning.plan import Asked
from vop.planning.rates import SECONDS, Rates
from vop.planning.shape import Work
from vop.quantised import float_type, stored
from vop.retrieval.reuse import Reuse
from vop.steps import planning
from vop.store import EmbeddingStore, tensor_column

# Round numbers, so that a person can follow.
RATES = Rates(
    made_with={"backbone": "xfeat", "block": None, "encoder": None, "image_size": 224},
    device="cpu", cores=2, measured_images=48, patches=256, token_width=256, width=256, global_width=256,
    image_bytes=1e6, decode_s=0.010, forward_s=0.030, sampled_s=0.040, write_s=0.0, file_s=0.0, read_s=0.0,
    catalog_s=1e-5, receipt_s=0.0, facts_s=0.0, prepare_s=1e-6, shortlist_row_s=1e-7,
    shortlist_query_s=1e-5, pair_s=1e-4, votes_query_s=1e-5, driver_query_s=1e-3, driver_pair_s=2e-5, message_s=1e-3,
    listed_s=2e-6, mutual=0.5, vote_bytes=240.0, kept_bytes=140.0, ranked_bytes=25.0, catalog_bytes=60.0,
    driver_bytes=2000.0, process_bytes=8e8,
    fixed_s={"start": 10.0, "models": 5.0, "embed": 5.0, "search": 3.0, "pairs": 0.0, "report": 2.0},
)  # fmt: skip
SHAPE = {"cpus_per_node": 4, "memory_gb_per_node": 64.0}


def planned(images, rates=RATES, queries=None, told=None, **sections):
    """The plan of so many images, on one node of four cores unless `told` otherwise."""
    asked = Asked(images, images, images, True) if queries is None else Asked(images + queries, images, queries, False)
    return plan.make(config.load(plan={**SHAPE, **(told or {})}, **sections), rates, asked)


def parts(stage):
    return {part.name: part.seconds for part in (*stage.serial, *stage.together)}


def test_embedding_by_hand():
    found = planned(5120, embedding={"shard_size": 128, "sample": 256}).stage("embed")
    assert parts(found) == pytest.approx(
        {
            "start of models": 10.0,
            "sample": 256 * 0.040,
            "catalog": 5120 * 1e-5,
            "receipts": 0.0,
            "cores": 5120 * 0.040 / 4,
            "models on replicas": 10 * 128 * 0.030 + 128 * 0.010,  # 40 shards, 10 on each of 4
        }
    )
    assert found.seconds == pytest.approx(10.0 + 10.24 + 0.0512 + 51.2)
    assert (found.shards, found.actors) == (40, 4)


def test_few_shards_leave_cores_idle():
    found = planned(150).stage("embed")  # 128 and 22
    assert found.slowest.name == "models on replicas"
    assert found.slowest.seconds == pytest.approx(128 * 0.040)


def test_cards_take_the_models_and_cores_the_rest():
    told = {"gpus_per_node": 2, "forward_images_per_s": 1000}
    found = planned(5120, told=told).stage("embed")
    assert parts(found)["cores"] == pytest.approx(5120 * 0.010 / 4)
    assert parts(found)["models on cards"] == pytest.approx(20 * 128 / 1000 + 128 * 0.010)
    assert found.slowest.name == "cores"
    assert found.cards == 2


def test_search_by_hand():
    found = planned(4000, retrieval={"shortlist": 50, "query_batch": 64})
    stage, scored = found.stage("search"), found.work.pairs_scored
    share = 0.5 + 0.5 * 50 / 3999  # of the listed pairs are listed from both sides, and scored once
    assert scored == round(4000 * 50 * (1 - share / 2))
    actor = 1000 * 1e-7 + 1e-5 + 1e-5 + scored / 4000 / 4 * 1e-4
    driver = 1e-3 + 50 * 2e-5 + 2 * 4 * 1e-3 / 64
    assert stage.shards == 4
    assert parts(stage)["search actors"] == pytest.approx(4000 * actor)
    assert parts(stage)["driver"] == pytest.approx(4000 * driver)
    assert parts(stage)["cores"] == pytest.approx(4000 * (driver + 4 * actor) / 4)
    assert parts(stage)["names"] == pytest.approx(4000 * 1e-6)
    assert stage.slowest.name == "driver"


def test_memory_that_runs_out_brings_pairs_back_to_both_sides():
    listed = 4000 * 50
    assert planned(4000, retrieval={"reuse_gb": 0.0}).work.pairs_scored == listed
    scored = [planned(4000, retrieval={"reuse_gb": gb}).work.pairs_scored for gb in (0.001, 0.002, 0.005, 1.0)]
    assert scored == sorted(scored, reverse=True)
    assert scored[0] < listed
    assert planned(4000, queries=100).work.pairs_scored == 100 * 50


def test_all_pairs_are_scored_once():
    assert planned(40, retrieval={"shortlist": 50}).work.pairs_scored == 40 * 39 // 2
    assert planned(40, retrieval={"shortlist": None}).work.pairs_scored == 40 * 39 // 2


def test_pairs_that_both_images_list_are_predicted_as_the_search_counts_them():
    N, K = 400, 20
    places = np.random.default_rng(0).random((N, 2))
    near = np.argsort(((places[:, None] - places[None]) ** 2).sum(-1), axis=1)[:, 1 : K + 1]
    ids = np.arange(N)
    reuse = Reuse(ids, ids, ids, 64, range(7), None, False, 1e9)
    scored = 0
    for number in range(7):
        of = ids[number * 64 : (number + 1) * 64]
        queries = np.repeat(np.arange(len(of)), K)
        scored += len(reuse.want(number, queries, near[of].ravel()))
    mutual = np.isin(near.ravel() * N + np.repeat(ids, K), np.repeat(ids, K) * N + near.ravel()).mean()
    rates = dataclasses.replace(RATES, mutual=(mutual - K / (N - 1)) / (1 - K / (N - 1)))
    assert planned(N, rates, retrieval={"shortlist": K}).work.pairs_scored == scored


@pytest.mark.parametrize("images", [200, 5_000, 70_000, 10**6])
def test_more_images_never_take_less(images):
    few, many = planned(images), planned(2 * images)
    for one, other in zip(few.stages, many.stages, strict=True):
        assert other.seconds >= one.seconds, one.name
        assert other.disk >= one.disk
    assert many.seconds > few.seconds
    assert many.work.pairs_scored > few.work.pairs_scored


def test_twice_the_nodes_halve_what_is_divided_and_nothing_else():
    one, two = (planned(10**6, told={"nodes": nodes, "network_gbit": 1000}) for nodes in (1, 2))
    assert parts(two.stage("embed"))["cores"] == pytest.approx(parts(one.stage("embed"))["cores"] / 2)
    assert parts(two.stage("embed"))["catalog"] == parts(one.stage("embed"))["catalog"]
    assert parts(two.stage("search"))["driver"] > parts(one.stage("search"))["driver"]  # twice the actors to ask


def test_an_object_store_is_waited_for():
    near, far = planned(10**5), planned(10**5, told={"storage": "object", "request_ms": 50})
    assert parts(far.stage("embed"))["requests"] == pytest.approx(10**5 * 0.060 / (4 * stages.DECODING))
    assert parts(far.stage("embed"))["receipts"] == pytest.approx(782 * (3 / 16 + 2) * 0.050)
    assert far.seconds > near.seconds


@pytest.mark.parametrize(
    ("dtype", "rows", "tokens"),
    [("float16", 64, False), ("float16", 24, True), ("int8", 24, False), ("float32", 5, True)],
)
def test_a_shard_has_the_bytes_that_were_planned(tmp_path, dtype, rows, tokens):
    asked = config.load(embedding={"dtype": dtype, "shard_size": rows, "tokens": tokens, "whiten": 128})
    work = Work(asked, RATES, rows, rows, rows, True)
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((rows, 256, 128)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    columns = {name: pa.array(np.arange(rows)) for name in ("image_id", "width", "height", "scaled_width")}
    columns |= {"scaled_height": columns["width"], "name": pa.array([f"folder/image-{i:05d}.jpg" for i in range(rows)])}
    columns["content"] = pa.array([f"{i:032x}" for i in range(rows)])
    columns["global"] = tensor_column(rng.standard_normal((rows, 256)).astype(float_type(dtype)))
    columns["patches"] = tensor_column(stored(vectors, dtype))
    if tokens:
        columns["tokens"] = tensor_column(rng.standard_normal((rows, 256, 256)).astype(float_type(dtype)))
    store = EmbeddingStore.create(str(tmp_path), {}, work.manifest, {})
    store.write_shard(0, pa.table(columns), [])
    assert rows * work.image_bytes == pytest.approx(files.listing(tmp_path)["shard-00000.parquet"], rel=0.02)


def test_the_memory_of_an_actor_is_what_the_search_declares():
    work = planned(10**5).work
    held = work.actor_bytes(25_000)
    assert held > 25_000 * 256 * 128 * 2
    assert work.actor_bytes(50_000) - held == pytest.approx(25_000 * (256 * 128 * 2 + 256 * 6 + 272), rel=1e-6)


def test_what_does_not_fit_is_refused_with_numbers_and_a_remedy():
    found = planned(10**6)  # 66 GB of patches in 64 GB, of which 45 are offered to actors
    (limit,) = found.limits
    assert "4 of 4 search actors" in limit.what
    assert limit.needed == 4 * found.work.actor_bytes(250_000)
    assert limit.there == pytest.approx(0.7 * 64e9)
    text = table.page(found)
    assert "this does not fit" in text
    assert "it fits with" in text
    remedies = changes.remedies(found)
    assert {"plan.nodes=2", "retrieval.cache=DIR"} <= {change.label for change in remedies}
    assert not any(change.plan.limits for change in remedies)
    assert [change for change in remedies if change.price] == remedies[-sum(bool(c.price) for c in remedies) :]


def test_the_driver_and_the_disk_have_limits_too():
    told = {"nodes": 64, "memory_gb_per_node": 160.0, "disk_gb": 100.0}
    whats = " ".join(limit.what for limit in planned(10**8, told=told).limits)
    assert "memory of the driver" in whats
    assert "disk for store" in whats
    enough = {**told, "disk_gb": 1e6}
    found = planned(10**8, told=enough)
    assert [limit.needed for limit in found.limits] == [8e8 + 10**8 * 2000.0 + 1e9]
    remedies = changes.remedies(found)
    assert remedies[0].label == "plan.memory_gb_per_node=320"
    assert planned(10**8, told={**enough, "memory_gb_per_node": 320.0}).limits == ()


def test_a_collection_that_no_change_makes_fit_is_divided():
    told = {"nodes": 64, "memory_gb_per_node": 40.0, "disk_gb": 1e6}
    found = planned(10**8, told=told)
    assert len(found.limits) == 2
    (remedy,) = changes.remedies(found)  # more memory, or more nodes, alone mend one of both
    assert remedy.label.startswith("8 jobs")
    assert "not paired" in remedy.price
    assert remedy.plan.seconds == pytest.approx(8 * planned(10**8 // 8, told=told).seconds)


def test_the_cheapest_change_removes_the_bottleneck():
    found = planned(2 * 10**5, retrieval={"shards": 256}, told={"memory_gb_per_node": 512.0, "nodes": 64})
    stage, part = found.bottleneck()
    assert (stage.name, part.name) == ("search", "driver")
    best, *others = changes.cheapest(found)
    assert best.plan.seconds_of("search", "driver") < 0.8 * part.seconds
    assert best.plan.seconds < found.seconds
    assert all(best.bill <= other.bill for other in others if not other.price)
    assert best.label in ("retrieval.query_batch=1024", "retrieval.shards=64")
    chain = changes.chain(found)
    assert chain
    assert all(one.bill <= found.bill and not one.price for one in chain)
    assert [one.plan.seconds for one in chain] == sorted((one.plan.seconds for one in chain), reverse=True)


def test_a_bill_is_in_money_where_prices_are_stated():
    told = {"nodes": 2, "gpus_per_node": 4, "forward_images_per_s": 500, "node_price": 2.0, "gpu_price": 1.5}
    found = planned(10**5, told=told)
    assert found.bill == pytest.approx(found.seconds / 3600 * 2 * (2.0 + 4 * 1.5))
    assert not dataclasses.replace(found, config=config.load()).priced


def test_rates_that_nothing_here_can_tell_must_be_stated():
    with pytest.raises(ConfigError, match=r"plan\.forward_images_per_s=N"):
        planned(1000, told={"gpus_per_node": 1})
    with pytest.raises(ConfigError, match=r"plan\.votes_pairs_per_s=N"):
        planned(1000, retrieval={"device": "cuda"})
    with pytest.raises(ConfigError, match=r"retrieval\.index=HNSW32"):
        planned(1000, retrieval={"index": "HNSW32", "shards": 2})
    on_a_card = dataclasses.replace(RATES, device="cuda")
    planned(1000, on_a_card, told={"gpus_per_node": 1})
    with pytest.raises(ConfigError, match="nothing of a core"):
        planned(1000, on_a_card)
    with pytest.raises(ConfigError, match="tokens to train on"):
        planned(1000, embedding={"patches": False, "tokens": True})


def test_numbers_are_written_as_people_write_them(tmp_path):
    told = config.load(overrides=["plan.images=100e6", "plan.queries=1000"]).plan
    assert (told.images, told.queries) == (100_000_000, 1000)
    with pytest.raises(ConfigError, match=r"plan\.images is 0\.5"):
        config.load(plan={"images": 0.5})
    with pytest.raises(ConfigError, match="how many images"):
        planning.size(config.load(), None)


def test_the_command_line_reads_rates_from_a_file(tmp_path, capsys):
    files.write_json(tmp_path / "a.json", {"rates": RATES.to_json()})
    arguments = [f"plan.rates={tmp_path}/a.json", "plan.memory_gb_per_node=64", "plan.cpus_per_node=4"]
    assert cli.main(["plan", "plan.images=20e3", f"plan.file={tmp_path}/b.json", *arguments]) == 0
    out = capsys.readouterr().out
    for text in ("register 20,000 images", "embed", "search", "lists", "first bottleneck", "assumed:"):
        assert text in out
    written = json.loads((tmp_path / "b.json").read_text())
    assert written["images"] == 20_000
    assert written["stages"]["embed"]["shards"] == 157
    assert Rates.read(str(tmp_path / "b.json"), config.load()) == RATES
    assert cli.main(["plan", "plan.images=1e6", *arguments]) == 2
    refused = capsys.readouterr()
    assert refused.out == ""
    assert "refused" in refused.err
    assert "search actors" in refused.err
    assert cli.main(["plan", "plan.images=1e3", "backbone=dinov2_vits14", *arguments]) == 2
    assert "measured with 'xfeat', asked for 'dinov2_vits14'" in capsys.readouterr().err
    (tmp_path / "b.json").write_text("{}")
    assert cli.main(["plan", "plan.images=1e3", f"plan.rates={tmp_path}/b.json"]) == 2
    assert "holds no rates" in capsys.readouterr().err


def test_a_sample_is_of_neighbours_from_everywhere():
    assert calibration.stretches(20).tolist() == [*range(20)]
    chosen = calibration.stretches(10**6)
    assert len(chosen) == calibration.SAMPLE
    assert (chosen[0], chosen[-1]) == (0, 10**6 - 1)
    assert (np.diff(chosen) == 1).sum() == calibration.SAMPLE - calibration.SAMPLE // calibration.STRETCH


def test_a_plan_of_a_collection_is_measured_here(rendered_collection, local_ray, tmp_path):
    told = config.load(images=str(rendered_collection), plan={"file": str(tmp_path / "plan.json"), **SHAPE})
    ran = {}

    def register(trial):
        ran["config"], ran["job"] = trial, pipeline.register(trial)
        return ran["job"]

    found = planning.planned(told, register).plan
    rates, counted = found.work.rates, ran["job"].counts
    assert found.work.images == 24
    measured = {name: value for name, value in rates.to_json().items() if name.endswith(("_s", "_bytes"))}
    free = {"fixed_s", "votes_query_s", "driver_query_s", "shortlist_query_s", "file_s"}  # what is left of a line
    assert all(value > 0 for name, value in measured.items() if name not in free), measured
    assert all(measured[name] >= 0 for name in free - {"fixed_s"})
    assert set(rates.fixed_s) == {*SECONDS}
    assert rates.fixed_s["start"] > 0
    assert 0 <= rates.mutual <= 1
    assert files.exists(tmp_path / "plan.json")
    # the small job that was run, as it would have been planned
    small = plan.make(planning.here(ran["config"]), rates, Asked(16, 16, 16, True))
    assert small.work.pairs_scored == counted["pairs_scored"]
    assert counted["images"] == 16
    assert small.work.shards == -(-16 // ran["config"].embedding.shard_size)
