class KiroSyncClient {
constructor(token) {
this.baseUrl = 'https://kiro.sovereignroute.com';
this.token = token;
this.headers = {
'Authorization': `Bearer ${token}`,
'Content-Type': 'application/json'
};
}
async getSync() {
const res = await fetch(`${this.baseUrl}/sync`, {
headers: this.headers
});
return res.json();
}
async pushSync(data) {
const res = await fetch(`${this.baseUrl}/sync`, {
method: 'POST',
headers: this.headers,
body: JSON.stringify(data)
});
return res.json();
}
async submitCommand(command) {
const res = await fetch(`${this.baseUrl}/command`, {
method: 'POST',
headers: this.headers,
body: JSON.stringify(command)
});
return res.json();
}
async getCommand(commandId) {
const res = await fetch(`${this.baseUrl}/command/${commandId}`, {
headers: this.headers
});
return res.json();
}
async waitForCommand(commandId, timeout = 30000) {
const start = Date.now();
while (Date.now() - start < timeout) {
const cmd = await this.getCommand(commandId);
if (cmd.status === 'completed' || cmd.status === 'failed') {
return cmd;
}
await new Promise(r => setTimeout(r, 1000));
}
throw new Error('Command timeout');
}
}
// Usage
const client = new KiroSyncClient('YOUR_TOKEN');
// Pull sync data
const data = await client.getSync();
// Submit command
const { commandId } = await client.submitCommand({
type: 'execute_bash',
command: 'ls -la'
});
// Wait for result
const result = await client.waitForCommand(commandId);
console.log(result.result.stdout);
