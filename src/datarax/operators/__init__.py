from ._element import (
    Element as Element,
    ElementOperator as ElementOperator,
    ElementOperatorConfig as ElementOperatorConfig,
    OperatorModule as OperatorModule,
)
