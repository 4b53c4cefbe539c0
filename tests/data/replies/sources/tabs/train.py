import math, random

RATE = 0.3
WIDTH = 8

def predict(weights, x):
	total = weights[-1]
	for i in range(WIDTH):
		total += weights[i] * math.sin((i + 1) * x)
	return total

def train(seed, steps):
	chance = random.Random(seed)
	weights = [0.0] * (WIDTH + 1)
	for step in range(steps):
		x = chance.uniform(-3, 3)
		error = predict(weights, x) - math.tanh(x)
		for i in range(WIDTH):
			weights[i] -= RATE * error * math.sin((i + 1) * x)
		weights[-1] -= RATE * error
		if step % 100 == 0:
			print("step", step, error)
	return weights
