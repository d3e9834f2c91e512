import requests
import time

class KiroSyncClient:
    def __init__(self, token):
        self.base_url = 'https://kiro.sovereignroute.com'
        self.headers = {
            'Authorization': f'Bearer {token}',
            'Content-Type': 'application/json'
        }

    def get_sync(self):
        r = requests.get(f'{self.base_url}/sync', headers=self.headers)
        return r.json()

    def push_sync(self, data):
        r = requests.post(f'{self.base_url}/sync',
            headers=self.headers, json=data)
        return r.json()

    def submit_command(self, command):
        r = requests.post(f'{self.base_url}/command',
            headers=self.headers, json=command)
        return r.json()

    def get_command(self, command_id):
        r = requests.get(f'{self.base_url}/command/{command_id}',
            headers=self.headers)
        return r.json()

    def wait_for_command(self, command_id, timeout=30):
        start = time.time()
        while time.time() - start < timeout:
            cmd = self.get_command(command_id)
            if cmd['status'] in ['completed', 'failed']:
                return cmd
            time.sleep(1)
        raise TimeoutError('Command timeout')

# Usage
client = KiroSyncClient('YOUR_TOKEN')
data = client.get_sync()
result = client.submit_command({'type': 'execute_bash', 'command': 'pwd'})
cmd = client.wait_for_command(result['commandId'])
print(cmd['result']['stdout'])
