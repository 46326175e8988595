"""The temperature T that softens logits, softmax(z / T) (Hinton, Vinyals and Dean, arXiv 1503.02531), where a method does not
name another: 4, as RepDistiller and mdistiller run their CIFAR benchmark."""

TEMPERATURE = 4.0
