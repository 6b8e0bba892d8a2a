"""DETR: a transformer turns an image's coarsest map and a set of learned queries into a box for each query, or none.

Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020, https://arxiv.org/abs/2005.12872, with
Transformers' layers, position embeddings, matching and losses.

    map at stride 32 ─ 1x1 convolution ─ encoder, which ignores padding ─▶ memory
    queries, memory ─ decoder ─▶ states after each layer ─ norm ─┬─▶ a class or none
                                                                 └─▶ centre and size of a box, 0 to 1 of the extent

Objects are matched one to one with queries at the least total cost; all other queries are trained to predict "none".
This is done after each layer of the decoder, and the losses are added up. As in the paper's code, the next layer gets a
layer's output from before the norm; Transformers' code with auxiliary losses differs here.

Shapes: N images, C channels of the transformer, P positions of the map, Q queries, L layers of the decoder, K classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import box_convert, clip_boxes_to_image
from transformers import DetrConfig
from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss
from transformers.models.detr.modeling_detr import (
    DetrDecoderLayer,
    DetrEncoderLayer,
    DetrMLPPredictionHead,
    DetrSinePositionEmbedding,
)

from pvt.dense import backbone, checkpoint_filter_fn
from pvt.detector import Detections, Detector, Extent, Objects
from pvt.model import STRIDES

__all__ = ["Detr", "backbone", "checkpoint_filter_fn"]

NONE_WEIGHT = 0.1
"""Weight of queries without an object in the classification loss."""

BBOX_WEIGHT = 5.0
GIOU_WEIGHT = 2.0


class Detr(Detector):
    """Backbone, transformer and heads. `width` is C, a multiple of `heads` and of 4; `feedforward` the hidden width.

    Detections are the boxes of the `max_detections` queries with the highest scores, each with its best class.
    """

    pretrained_cfg = {"classifier": "classifier"}

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        queries: int = 100,
        width: int = 256,
        heads: int = 8,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        feedforward: int = 2048,
        dropout: float = 0.1,
        max_detections: int = 100,
    ) -> None:
        super().__init__(backbone, num_classes)
        layer = DetrConfig(
            d_model=width,
            encoder_attention_heads=heads,
            decoder_attention_heads=heads,
            encoder_ffn_dim=feedforward,
            decoder_ffn_dim=feedforward,
            dropout=dropout,
            attention_dropout=dropout,
            activation_dropout=dropout,
        )
        # Outside of Transformers' own models nothing chooses an implementation.
        layer._attn_implementation = "sdpa"
        self.projection = nn.Conv2d(self.widths[-1], width, 1)
        self.position_embedding = DetrSinePositionEmbedding(width // 2, normalize=True)
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.encoder = nn.ModuleList(DetrEncoderLayer(layer) for _ in range(encoder_layers))
        self.decoder = nn.ModuleList(DetrDecoderLayer(layer) for _ in range(decoder_layers))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, num_classes + 1)
        self.box_head = DetrMLPPredictionHead(width, width, output_dim=4, num_layers=3)
        self.max_detections = max_detections
        # As in the paper's code; Transformers' initialisation belongs to its own model class.
        for module in (*self.encoder.modules(), *self.decoder.modules()):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def predict(self, maps: list[Tensor], extents: Sequence[Extent]) -> tuple[Tensor, Tensor]:
        """Returns logits [L, N, Q, K + 1], the last for "none", and boxes [L, N, Q, 4] after each decoder layer.

        Boxes are centre x, y, width, height, 0 to 1 of the image's extent.
        """
        x = self.projection(maps[-1])  # [N, C, h, w]
        inside = _is_inside(extents, x)  # [N, h, w]
        positions = self.position_embedding(x.shape, x.device, torch.float32, inside)  # [N, C, h, w]
        positions = positions.flatten(2).transpose(1, 2)  # [N, P, C]
        memory = x.flatten(2).transpose(1, 2)  # [N, P, C]
        keys = inside.flatten(1)[:, None, None]  # [N, 1, 1, P]
        for layer in self.encoder:
            memory = layer(memory, keys, spatial_position_embeddings=positions)
        queries = self.queries.expand(memory.shape[0], -1, -1)  # [N, Q, C]
        state = torch.zeros_like(queries)
        states = []
        for layer in self.decoder:
            state = layer(
                state,
                None,
                positions,
                queries,
                memory,
                encoder_attention_mask=keys,
            )
            states.append(self.norm(state))
        decoded = torch.stack(states)
        return self.classifier(decoded).float(), self.box_head(decoded).float().sigmoid()

    def losses(
        self,
        maps: list[Tensor],
        extents: Sequence[Extent],
        targets: Sequence[Objects],
    ) -> list[dict[str, Tensor]]:
        logits, boxes = self.predict(maps, extents)
        # A network that diverged: the caller has to see losses that are not finite, and matching would raise.
        if not boxes.isfinite().all():
            undefined = logits.sum() + boxes.sum()
            return [dict.fromkeys(("classification", "bbox", "giou"), undefined) for _ in targets]
        return [
            self._losses(logits[:, i], boxes[:, i], extent, objects)
            for i, (extent, objects) in enumerate(zip(extents, targets, strict=True))
        ]

    def _losses(
        self,
        logits: Tensor,
        boxes: Tensor,
        extent: Extent,
        objects: Objects,
    ) -> dict[str, Tensor]:
        """Returns an image's weighted losses from its logits [L, Q, K + 1] and boxes [L, Q, 4]."""
        matcher = HungarianMatcher(
            class_cost=1,
            bbox_cost=BBOX_WEIGHT,
            giou_cost=GIOU_WEIGHT,
        )
        loss = ImageLoss(matcher, self.num_classes, NONE_WEIGHT, []).to(logits.device)
        height, width = extent
        size = boxes.new_tensor([width, height, width, height])
        target = {
            "class_labels": objects.labels,
            "boxes": box_convert(objects.boxes, "xyxy", "cxcywh") / size,
        }
        # The layers take the place of a batch's images in Transformers, so each is matched by itself.
        outputs = {"logits": logits, "pred_boxes": boxes}
        targets = [target] * len(logits)
        matches = matcher(outputs, targets)
        # num_classes stands for "none".
        classes = objects.labels.new_full(logits.shape[:2], self.num_classes)
        for layer, (queries, matched) in enumerate(matches):
            classes[layer, queries] = objects.labels[matched]
        # A list of queries, because on CUDA the kernel for more dimensions is not deterministic. All layers have the
        # same sum of weights, so the mean over all queries, times L, is the sum of the layers' losses.
        of_labels = functional.cross_entropy(
            logits.flatten(0, 1),
            classes.flatten(),
            loss.empty_weight,
        )
        of_boxes = loss.loss_boxes(outputs, targets, matches, max(len(objects), 1))
        return {
            "classification": of_labels * len(logits),
            "bbox": of_boxes["loss_bbox"] * BBOX_WEIGHT,
            "giou": of_boxes["loss_giou"] * GIOU_WEIGHT,
        }

    def detect(self, maps: list[Tensor], extents: Sequence[Extent]) -> list[Detections]:
        logits, boxes = self.predict(maps, extents)
        scores, labels = logits[-1].softmax(-1)[..., :-1].max(-1)  # [N, Q]
        return [self._select(boxes[-1, i], scores[i], labels[i], extent) for i, extent in enumerate(extents)]

    def _select(
        self,
        boxes: Tensor,
        scores: Tensor,
        labels: Tensor,
        extent: Extent,
    ) -> Detections:
        """Returns an image's detections from the boxes [Q, 4], scores [Q] and labels [Q] of its queries."""
        height, width = extent
        size = boxes.new_tensor([width, height, width, height])
        corners = box_convert(boxes, "cxcywh", "xyxy") * size
        best = scores.topk(min(self.max_detections, len(scores))).indices
        return Detections(clip_boxes_to_image(corners, extent), scores, labels)[best]


def _is_inside(extents: Sequence[Extent], x: Tensor) -> Tensor:
    """Returns which positions of a map [N, C, h, w] at stride 32 begin inside their image, [N, h, w] bool."""
    sides = torch.as_tensor(extents, device=x.device)
    rows, columns = (torch.arange(side, device=x.device) * STRIDES[-1] for side in x.shape[-2:])
    is_row_inside = rows[:, None] < sides[:, 0, None, None]
    is_column_inside = columns < sides[:, 1, None, None]
    return is_row_inside & is_column_inside
