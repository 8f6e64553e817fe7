"""`teacher_tuning: own`: a distillation learns from the class scores of the head that a teacher's weights came with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import CLASSES, draw, given_for, make_case, make_images, run_chain, teacher_outputs

from methods.attention_transfer import AttentionTransfer
from methods.contract import TEACHER
from methods.darts import DARTS
from methods.fitnet import FitNet
from methods.fna import FNA
from methods.heads import TEACHER_HEAD
from methods.kd import KD, KDConfig, distillation_loss
from methods.ota import OTA, OTAConfig
from methods.rkd import RKD
from methods.tdmr import TDMR
from methods.tuning import LOGITS, tuning_refuses

OWN = KDConfig(teacher_tuning="own")


def setting_with(classes: int, kind: str = "classification"):
    setting = make_case("vit", "cnn").setting
    teacher = replace(setting.teacher, classes=classes)
    return replace(setting, teacher=teacher, task=replace(setting.task, kind=kind))


def test_the_teachers_own_logits_teach():
    case = make_case("vit", "cnn")
    (stage,) = KD.stages(OWN, setting_with(CLASSES))
    assert (stage.feed.outputs, stage.feed.of, stage.inputs) == ((LOGITS,), TEACHER, ())
    learner = stage.learner(stage.params, given_for(stage, case, torch.zeros(0), {})).eval()
    images, labels = make_images(16)
    batch = draw(stage, case, images, labels, 16)
    own = teacher_outputs(case.teacher, batch.images, (LOGITS,))[LOGITS.key].float()
    expected = distillation_loss(learner.student(batch.images), own, 4.0)
    assert torch.equal(learner(batch, 0.0)["kd"], expected)


@pytest.mark.parametrize("method", [KD, FitNet, RKD, AttentionTransfer, FNA, DARTS], ids=lambda m: m.name)
def test_every_method_built_on_kd_can_learn_from_them(method):
    case = make_case("vit", "vit")
    setting = replace(case.setting, teacher=replace(case.setting.teacher, classes=CLASSES))
    config = method.Config(teacher_tuning="own")
    assert method.invalid(config, setting) is None
    stages = method.stages(config, setting)
    assert TEACHER_HEAD not in [stage.name for stage in stages]
    assert all(LOGITS in s.feed.outputs and s.feed.of == TEACHER for s in stages if s.name in ("search", "distil"))
    chain = run_chain(method, config, replace(case, setting=setting), *make_images(), steps=2)
    assert "kd" in chain.parts[-1]


@pytest.mark.parametrize("kind", ["classification", "multilabel"])
def test_it_is_for_a_head_of_as_many_classes_as_the_task_has(kind):
    assert KD.invalid(OWN, setting_with(CLASSES, kind)) is None
    said = KD.invalid(OWN, setting_with(1000, kind))
    assert said == (
        f"teacher_tuning 'own': the weights of tiny/vit came with a head of 1000 classes, and the task has {CLASSES} "
        "classes"
    )
    assert "came with no head" in KD.invalid(OWN, setting_with(0, kind))


def test_no_pixel_has_a_class_by_it_and_methods_that_read_no_class_scores_refuse_it():
    assert "no class a pixel" in KD.invalid(OWN, setting_with(CLASSES, "segmentation"))
    said = "teacher_tuning 'own': that is for kd and the methods built on it"
    assert OTA.invalid(OTAConfig(teacher_tuning="own"), setting_with(CLASSES)) == said
    assert TDMR.invalid(TDMR.Config(teacher_tuning="own"), setting_with(CLASSES)) == said
    assert tuning_refuses("none", setting_with(0)) is None


def test_it_is_a_value_of_the_knob_that_nothing_searches_unasked():
    with pytest.raises(ValueError, match=r"allowed: none, own, .*Did you mean 'own'"):
        KDConfig(teacher_tuning="owns")
    assert KDConfig().teacher_tuning == "none"
    (_, stage) = KD.stages(KDConfig(), setting_with(CLASSES))
    assert stage.params == {"temperature": 4.0, "weight": 0.5, "tuned": False}  # as the keys of old results have it
