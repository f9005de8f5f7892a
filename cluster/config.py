"""Settings of the demo, one class; the steps it runs have their own classes in extractor and trainer."""

from __future__ import annotations

from pydantic import Field, PositiveInt

from common.config import StrictModel


class DemoConfig(StrictModel):
    """How large the demo is. The defaults take six to twelve minutes on two cores."""

    seed: int = Field(0, description="Another seed draws other pictures and trains other models.")
    image_size: PositiveInt = Field(64, description="Side of the drawn pictures and of all models, in pixels.")
    train_pictures: PositiveInt = Field(700, description="Pairs per modality in the student's train split.")
    val_pictures: PositiveInt = Field(64, description="Pairs per modality in val, which picks the best checkpoint.")
    test_pictures: PositiveInt = Field(250, description="Pairs per modality in test, behind every number shown.")
    teacher_pictures: PositiveInt = Field(1500, description="Pictures per modality that only its specialist sees.")
    teacher_steps: PositiveInt = Field(300, description="Training steps of each specialist.")
    teacher_batch: PositiveInt = Field(64, description="Pictures per step of a specialist.")
    teacher_lr: float = Field(2e-3, gt=0, description="Peak learning rate of the specialists.")
    student_batch: PositiveInt = Field(128, description="Pairs per step in both stages.")
    stage1_epochs: PositiveInt = Field(14, description="Passes of stage 1.")
    stage2_epochs: PositiveInt = Field(18, description="Passes of stage 2.")
    stage1_lr: float = Field(1e-3, gt=0, description="Peak learning rate of stage 1.")
    stage2_lr: float = Field(2e-3, gt=0, description="Peak learning rate of stage 2.")
    min_skill: float = Field(0.55, ge=0, le=1, description="See SelectConfig; most captions here are generic.")
