import torch

torch.manual_seed(0)
x = torch.linspace(-3, 3, 256).unsqueeze(1)
y = torch.sin(2 * x) + 0.1 * torch.randn_like(x)
x_train, y_train = x[::2], y[::2]
x_val, y_val = x[1::2], y[1::2]

HIDDEN = 32
STEPS = 200

model = torch.nn.Sequential(
    torch.nn.Linear(1, HIDDEN),
    torch.nn.ReLU(),
    torch.nn.Linear(HIDDEN, 1),
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
loss_function = torch.nn.MSELoss()

for step in range(STEPS):
    optimizer.zero_grad()
    loss = loss_function(model(x_train), y_train)
    loss.backward()
    optimizer.step()

with torch.no_grad():
    print("val_loss:", loss_function(model(x_val), y_val).item())
