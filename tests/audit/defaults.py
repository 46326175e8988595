"""Every default of ours that the authors' scripts or configs set: read there, and compared."""

import re

from official import MD, RD, SIMKD, folder

from pwkd_jax import distillers

RD_SCRIPT, RD_TRAIN, CFG = "scripts/run_cifar_distill.sh", "train_student.py", "mdistiller/engine/cfg.py"
MLKD, CAT = "Jin-Ying/Multi-Level-Logit-Distillation", "GzyAftermath/CAT-KD"
CAT_FILE, COPY = "configs/cifar100/CAT_KD/res32x4_res8x4.yaml", "FabienCode/mdistiller"
COPY_FILE, SRD = "configs/DFKD/cifar/res324_84.yaml", "roymiles/Simple-Recipe-Distillation"
TD = "yoshitomo-matsubara/torchdistill"
SRD_FILE, TD_FILE = "imagenet/torchdistill/losses/single.py", "torchdistill/losses/mid_level.py"
MGD_FILE = "cls/configs/distillers/mgd/res34_distill_res18_img.py"
NKD_FILE, DIST = "configs/distillers/imagenet/res34_distill_res18_img.py", "hunto/image_classification_sota"
DIST_FILE = "configs/strategies/distill/dist_cifar.yaml"
SDD, WKD, NORM = "shicaiwei123/SDD-CVPR2024", "JiamingLv/WKD", "OSVAI/NORM"
WKD_FILES, DIFF = "configs/cifar100/wkd_{}/res32x4_res8x4.yaml", "configs/strategies/distill/diffkd/diffkd_b1.yaml"

FCFD, FCFD_FILE = "LiuDongyang6/FCFD", "classification/experiments/cifar/resnet8x4-resnet32x4.yaml"
SCALEKD = "deep-optimization/ScaleKD"
SCALEKD_FILE = "configs/distillers/traditional_traning_strategy/swin-l_distill_res50_img_s3_s4.py"


def flag(method: str, letter: str) -> str:
    return rf"--distill {method} [^\n]*-{letter} ([\d.]+)"


def config(key: str) -> str:
    return rf"CFG\.{re.escape(key)} = ([\d.]+)"


def wkd(letter: str, fields: dict[str, str]) -> list[tuple]:
    """Of either WKD: our fields and their keys, with what the two have in common."""
    fields |= {"ce_weight": "CE_WEIGHT", "fade_start": "COSINE_DECAY_EPOCH", "fade_end": "EPOCHS"}
    return [(ours, WKD, WKD_FILES.format(letter), rf"\b{theirs}: ([\d.]+)") for ours, theirs in fields.items()]


def argument(name: str) -> str:
    return rf"'--{name}'[^\n]*default=\[?([\d.]+)"


# method: [(our field, repository, file, expression whose group is their number)]
DEFAULTS = {
    "kd": [("ce_weight", RD, RD_SCRIPT, flag("kd", "r")), ("weight", RD, RD_SCRIPT, flag("kd", "a")),
           ("temperature", RD, RD_TRAIN, argument("kd_T"))],
    "fitnet": [("weight", RD, RD_SCRIPT, flag("hint", "b")), ("hint_stage", RD, RD_TRAIN, argument("hint_layer"))],
    "at": [("weight", RD, RD_SCRIPT, flag("attention", "b")), ("p", MD, CFG, config("AT.P"))],
    "sp": [("weight", RD, RD_SCRIPT, flag("similarity", "b"))],
    "cc": [("weight", RD, RD_SCRIPT, flag("correlation", "b")), ("features", RD, RD_TRAIN, argument("feat_dim"))],
    "vid": [("weight", RD, RD_SCRIPT, flag("vid", "b")), ("initial_variance", MD, CFG, config("VID.INIT_PRED_VAR"))],
    "rkd": [("weight", RD, RD_SCRIPT, flag("rkd", "b")), ("distance_weight", MD, CFG, config("RKD.DISTANCE_WEIGHT")),
            ("angle_weight", MD, CFG, config("RKD.ANGLE_WEIGHT"))],
    "pkt": [("weight", RD, RD_SCRIPT, flag("pkt", "b"))],
    "nst": [("weight", RD, RD_SCRIPT, flag("nst", "b"))],
    "ft": [("weight", RD, RD_SCRIPT, flag("factor", "b")), ("initial_epochs", RD, RD_TRAIN, argument("init_epochs"))],
    "ab": [("initial_epochs", RD, RD_TRAIN, argument("init_epochs"))],
    "fsp": [("initial_epochs", RD, RD_TRAIN, argument("init_epochs"))],
    "crd": [("weight", RD, RD_SCRIPT, flag("crd", "b")), ("features", RD, RD_TRAIN, argument("feat_dim")),
            ("negatives", RD, RD_TRAIN, argument("nce_k")), ("temperature", RD, RD_TRAIN, argument("nce_t")),
            ("momentum", RD, RD_TRAIN, argument("nce_m"))],
    "kdsvd": [("k", MD, CFG, config("KDSVD.K")), ("weight", MD, CFG, config("KDSVD.LOSS.FEAT_WEIGHT"))],
    "ofd": [("weight", MD, CFG, config("OFD.LOSS.FEAT_WEIGHT"))],
    "reviewkd": [("weight", MD, CFG, config("REVIEWKD.REVIEWKD_WEIGHT")),
                 ("warmup_epochs", MD, CFG, config("REVIEWKD.WARMUP_EPOCHS"))],
    "dkd": [("alpha", MD, CFG, config("DKD.ALPHA")), ("beta", MD, CFG, config("DKD.BETA")),
            ("temperature", MD, CFG, config("DKD.T")), ("warmup_epochs", MD, CFG, config("DKD.WARMUP"))],
    "rld": [(ours, "zju-SWJ/RLD", CFG, config(f"RLD.{theirs}")) for ours, theirs in (
        ("ce_weight", "CE_WEIGHT"), ("alpha", "ALPHA"), ("beta", "BETA"), ("confidence_temperature", "ALPHA_T"),
        ("temperature", "T"), ("warmup_epochs", "WARMUP"))],
    "mlkd": [("ce_weight", MLKD, CFG, config("KD.LOSS.CE_WEIGHT")), ("weight", MLKD, CFG, config("KD.LOSS.KD_WEIGHT"))],
    "nkd": [("temperature", "yzd-v/cls_KD", NKD_FILE, r"use_this = nkd,\s+temp=([\d.]+)"),
            ("gamma", "yzd-v/cls_KD", NKD_FILE, r"use_this = nkd,\s+temp=[\d.]+,\s+gamma=([\d.]+)")],
    "dist": [("ce_weight", DIST, DIST_FILE, r"ori_loss_weight:\s+([\d.]+)"),
             ("weight", DIST, DIST_FILE, r"\nkd_loss_weight: ([\d.]+)"),
             ("temperature", DIST, DIST_FILE, r"kd: dist_t([\d.]+)")],
    "ctkd": [("lowest", "zhengli97/CTKD", RD_TRAIN, argument("t_start")),
             ("span", "zhengli97/CTKD", RD_TRAIN, argument("t_end")),
             ("curriculum_epochs", "zhengli97/CTKD", RD_SCRIPT, r"--decay_loops (\d+)"),
             ("ce_weight", "zhengli97/CTKD", RD_SCRIPT, r"--model_s resnet20 -r ([\d.]+) -a 0.9 -b 0 "),
             ("weight", "zhengli97/CTKD", RD_SCRIPT, r"--model_s resnet20 -r 0.1 -a ([\d.]+) -b 0 ")],
    "semckd": [("weight", SIMKD, RD_SCRIPT.replace("cifar_", ""), flag("semckd", "b")),
               ("temperature", SIMKD, RD_TRAIN, argument("soft"))],
    "srrl": [("weight", SIMKD, RD_SCRIPT.replace("cifar_", ""), flag("srrl", "b"))],
    "simkd": [("weight", SIMKD, RD_SCRIPT.replace("cifar_", ""), flag("simkd", "b")),
              ("ce_weight", SIMKD, RD_SCRIPT.replace("cifar_", ""), flag("simkd", "c")),
              ("factor", SIMKD, RD_TRAIN, argument("factor"))],
    "catkd": [("weight", CAT, CAT_FILE, r"CAT_loss_weight: ([\d.]+)"), ("resolution", CAT, CAT_FILE, r"CAM_RESOLUTION: (\d+)")],
    "mgd": [("weight", "yzd-v/MGD", MGD_FILE, r"alpha_mgd=([\d.]+)"),
            ("masked", "yzd-v/MGD", MGD_FILE, r"lambda_mgd=([\d.]+)")],
    "ofa": [(ours, "Hao840/OFAKD", "train.py", argument(theirs)) for ours, theirs in (
        ("ce_weight", "gt-loss-weight"), ("weight", "kd-loss-weight"), ("stages_weight", "ofa-loss-weight"), ("eps", "ofa-eps"),
        ("temperature", "ofa-temperature"))],
    "ttm": [("exponent", "zkxufo/TTM", "README.md", r"--distill ttm --ttm_l ([\d.]+)"),
            ("weight", "zkxufo/TTM", "README.md", r"-r 1 -b ([\d.]+) -a 0")],
    "wttm": [("exponent", "zkxufo/TTM", "README.md", r"--add wttm --ttm_l ([\d.]+)"),
             ("weight", "zkxufo/TTM", "README.md", r"-b 0.8 -a ([\d.]+)")],
    "ickd": [("weight", "ADLab-AutoDrive/ICKD", "Cifar100/README.md", r"--distill ickd [^\n]*-b ([\d.]+)")],
    "srd": [("feature_weight", SRD, SRD_FILE, r"l_rep = ([\d.]+) \*"), ("exponent", SRD, SRD_FILE, r"c_diff\.pow\(([\d.]+)\)"),
            ("temperature", SRD, SRD_FILE, r"T = ([\d.]+)\n\s+p_s = F")],
    "streamlined": [("temperature", TD, TD_FILE, r"class SKDInstanceLoss[\s\S]*?temperature=([\d.]+)"),
                    ("tikhonov", TD, TD_FILE, r"tikhonov=(1e-1),")],
    "sokd": [("weight", COPY, COPY_FILE, r"AUG_FEAT_WEIGHT: ([\d.]+)"), ("areas", COPY, COPY_FILE, r"AREA_NUM: (\d+)"),
             ("hint_stage", COPY, COPY_FILE, r"HINT_LAYER: (\d+)"), ("policy_epochs", COPY, COPY_FILE, r"SERACH_EPOCH: (\d+)"),
             ("kinds", COPY, "mdistiller/distillers/DFKD.py", r"AreaDetection\([^\n]*, (\d+)\)")],
    "sdd": [("ce_weight", SDD, CFG, config("KD.LOSS.CE_WEIGHT")), ("weight", SDD, CFG, config("KD.LOSS.KD_WEIGHT")),
            ("temperature", SDD, CFG, config("KD.TEMPERATURE")),
            ("complementary", SDD, "mdistiller/distillers/KD.py", r"index\[gw_lt\] = ([\d.]+)"),
            ("scales", SDD, "teacher_resnet32x4.sh", r"sdd_kd/res32x4_res8x4.yaml --gpu 1 --M \[1,(\d)\]")],
    "sdd_dkd": [("ce_weight", SDD, CFG, config("DKD.CE_WEIGHT")), ("alpha", SDD, CFG, config("DKD.ALPHA")),
                ("beta", SDD, CFG, config("DKD.BETA")), ("temperature", SDD, CFG, config("DKD.T")),
                ("warmup_epochs", SDD, "train_origin.py", r'"--warmup", type=float, default=([\d.]+)'),
                ("complementary", SDD, "mdistiller/distillers/SDD_DKD.py", r"index\[gw_lt\] = ([\d.]+)")],
    "wkd_l": wkd("l", {"transport_weight": "WKD_LOGIT_WEIGHT", "temperature": "TEMPERATURE", "regularisation": "LAMBDA",
                       "iterations": "ITER", "sharpness": "COST_MATRIX_SHARPEN"}),
    "wkd_f": wkd("f", {"weight": "WKD_FEAT_WEIGHT", "mean_weight": "MEAN_COV_RATIO", "grid": "SPATIAL_GRID"}),
    "norm": [("label_weight", NORM, "README.md", r"--model_s resnet8x4 -r ([\d.]+)"),
             ("kd_weight", NORM, "README.md", r"-r 0.1 -a ([\d.]+)"), ("norm_weight", NORM, "README.md", r"-a 0 -b ([\d.]+)"),
             ("parts", NORM, "README.md", r"-b 1.0 -s (\d+)"), ("scale", NORM, "train_cifar_student.py", argument("ceta")),
             ("temperature", NORM, "train_cifar_student.py", argument("kd_T"))],
    "vkd": [("weight", "roymiles/VkD", "main_distributed.py", argument("alpha"))],
    "abkd": [("weight", "ghwang-s/abkd", "README.md", r"# gpu_id\s+([\d.]+)\s+# b \(weight"),
             ("alpha", "ghwang-s/abkd", "README.md", r"([\d.]+) \\\s+# start_alpha\s"),
             ("temperature", "ghwang-s/abkd", "standard_classification/train_student.py", argument("kd_T"))],
    "fcfd": [
        ("temperature", FCFD, FCFD_FILE, r"\nT: ([\d.]+)"), ("feature_weight", FCFD, FCFD_FILE, r"weight_l2: ([\d.]+)"),
        ("ce_weight", FCFD, FCFD_FILE, r"loss_student:\s+label:\s+x: \[0\]\s+y: \[([\d.]+)\]"),
        ("paths", FCFD, "classification/cifar/main.py", r"'--extra_paths', type=int, default=(\d+)"),
        ("ramp_epochs", FCFD, "classification/cifar/main.py", r"if epoch < (\d+):")],
    "scalekd": [("kd_weight", SCALEKD, SCALEKD_FILE, r"temp=1.0,\s+alpha=([\d.]+)"),
                ("ce_weight", SCALEKD, SCALEKD_FILE, r"temp=1.0,\s+alpha=([\d.]+)"),
                ("temperature", SCALEKD, SCALEKD_FILE, r"temp=([\d.]+)"),
                ("spatial", SCALEKD, SCALEKD_FILE, r"alpha=\[([\d.]+),"),
                ("frequency", SCALEKD, SCALEKD_FILE, r"alpha=\[[\d.]+, ([\d.]+)\]")],
    "crld": [(ours, "scx-822/CRLD-main", CFG, config(f"CRLD.{theirs}")) for ours, theirs in (
        ("ce_weight", "CE_WEIGHT"), ("same_weight", "WV_WEIGHT"), ("cross_weight", "CV_WEIGHT"),
        ("temperature", "TEMPERATURE"), ("sure_weak", "TAU_W"), ("sure_strong", "TAU_S"))],
    "diffkd": [("ce_weight", DIST, DIFF, r"ori_loss_weight: ([\d.]+)"), ("weight", DIST, DIFF, r"\nkd_loss_weight: ([\d.]+)"),
               ("temperature", DIST, DIFF, r"tau: ([\d.]+)"),
               ("steps", DIST, "lib/models/losses/diffkd/diffkd.py", r"inference_steps=(\d+)")],
}  # fmt: skip


def check(only: list[str]) -> list[dict]:
    """[{method, field, ours, theirs, source}] of every default above."""
    rows = []
    for method, fields in DEFAULTS.items():
        if only and method not in only:
            continue
        ours = distillers.fields(method)
        for field, repository, path, expression in fields:
            found = re.search(expression, (folder(repository) / path).read_text())
            theirs = float(found[1]) if found else None
            source = f"{repository} {path}"
            own = float(*ours[field]) if isinstance(ours[field], tuple) else float(ours[field])
            rows.append({"method": method, "field": field, "ours": own, "official": theirs, "source": source})
    return rows

