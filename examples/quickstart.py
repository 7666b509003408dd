"""Train a small network on the embedded digits, convert it, and see what each time step is worth.

Run: .venv/bin/python examples/quickstart.py (some 10 s on two CPU cores)
"""

import quickspike as qs
from quickspike.data import load_data
from quickspike.demo import train_digits

digits = load_data("digits")
network = train_digits(digits)
calibration = digits.loader("train", limit=500)
images, labels = next(iter(digits.loader("test")))

print(qs.inspect(network, images[:1]))
snn = qs.convert(network, calibration, method="threshold_balancing", steps=8)
report = qs.evaluate(snn, digits.loader("test"), reference=network, steps=(1, 2, 4, 8))
for step, accuracy in report.accuracy.items():
    print(f"T = {step}: {accuracy:.2f} % (source network {report.reference_accuracy:.2f} %)")

run = snn.run(images)
print("logits after each step:", tuple(run.logits.shape))
for site, rate in run.rates.items():
    print(f"{site}: {rate:.3f} spikes per neuron and step")
