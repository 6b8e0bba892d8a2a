"""Every setting of a run, typed; reading YAML and command-line overrides, and the fingerprint.

    configs/*.yaml ──yaml_text.read──▶ tree ──--set key=value──▶ tree ──pydantic──▶ Config (frozen)

A key that is not a field is an error that names the nearest field, so a typing mistake cannot become a default. A
section lists the former names of its settings in `renamed`: they are accepted with a warning.
"""

from pipeline.config.cluster import ClusterConfig, EnvironmentConfig
from pipeline.config.config import Config, RunConfig, divisors
from pipeline.config.data import AugmentConfig, DataConfig, ImageConfig, MixConfig, SourceConfig
from pipeline.config.fields import Length, RandAugment
from pipeline.config.load import (
    dump_config,
    fingerprint,
    load_config,
    load_section,
    read_json,
    read_yaml,
    validated,
)
from pipeline.config.messages import rule_of, setting_names
from pipeline.config.model import InitConfig, ModelConfig
from pipeline.config.section import present_key
from pipeline.config.task import (
    AnchorBasedConfig,
    AnyTaskConfig,
    ClassificationConfig,
    DenseConfig,
    DetectionConfig,
    DetrConfig,
    MaskRcnnConfig,
    RetinaNetConfig,
    SemanticFpnConfig,
    TaskConfig,
)
from pipeline.config.tracking import Bound, Gates, HandoffConfig, TrackingConfig
from pipeline.config.train import (
    CheckpointConfig,
    DebugConfig,
    EngineConfig,
    EvaluateConfig,
    GuardConfig,
    OptimConfig,
    ProfileConfig,
    ResumeConfig,
    TrainConfig,
)

# Registered versions carry the code of their time, which imports these names.
Classification = ClassificationConfig
SemanticFpn = SemanticFpnConfig

__all__ = [
    "AnchorBasedConfig",
    "AnyTaskConfig",
    "AugmentConfig",
    "Bound",
    "CheckpointConfig",
    "ClassificationConfig",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "DebugConfig",
    "DenseConfig",
    "DetectionConfig",
    "DetrConfig",
    "EngineConfig",
    "EnvironmentConfig",
    "EvaluateConfig",
    "Gates",
    "GuardConfig",
    "HandoffConfig",
    "ImageConfig",
    "InitConfig",
    "Length",
    "MaskRcnnConfig",
    "MixConfig",
    "ModelConfig",
    "OptimConfig",
    "ProfileConfig",
    "RandAugment",
    "ResumeConfig",
    "RetinaNetConfig",
    "RunConfig",
    "SemanticFpnConfig",
    "SourceConfig",
    "TaskConfig",
    "TrackingConfig",
    "TrainConfig",
    "divisors",
    "dump_config",
    "fingerprint",
    "load_config",
    "load_section",
    "present_key",
    "read_json",
    "read_yaml",
    "rule_of",
    "setting_names",
    "validated",
]
