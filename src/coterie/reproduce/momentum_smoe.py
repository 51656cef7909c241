"""What momentum over depth does to stability, on experts whose curvature is known, and to noisy digits.

Spectrum: an expert u = -H x in 16 dimensions, H symmetric with eigenvalues from 1 down to 1/κ, in a stack of
residual layers. How large may γ be before the stack diverges, and how many layers take x to a thousandth of
its length, each method at its best γ? Then four experts u = -H_i (x - c_i) behind a top-2 gate: up to which γ
does the mean of 64 tokens stay bounded over 200 layers?

Digits: 1797 drawn ones of 8 × 8 pixels, 1200 to train on; a linear layer to 32, eight residual layers of
SMoE(LayerNorm x) with eight ReLU experts of width 32 and a top-2 gate, and a linear read-out. 300 steps of 128.
Tested on the other 597, clean and with noise that training has not seen: Gaussian (0.2, 0.4) and impulse (0.1,
0.2), three draws each. The control arms have no momentum but the step γ, or γ / (1 - μ), of those that have.

`--data optdigits.tes` takes the handwritten digits of the UCI repository, the same as in scikit-learn, which
were to be the data here. Text: the `mixed_markov` text in a four-layer decoder, tested with a share of its
tokens swapped for one never seen. The paper trains on WikiText-103 and ImageNet, tests on ImageNet-A, -C and
-R, and claims more than is tested here; of text nothing is claimed, as seeds differ by more than methods do.
"""
