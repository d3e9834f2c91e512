interface ExecuteCommandResponse {
  /** Whether command executed successfully */
  success: boolean;
  
  /** Command output */
  output: string;
  
  /** Error message if failed */
  error?: string;
  
  /** Execution time in milliseconds */
  executionTimeMs: number;
}

interface ExecuteCommandOptions {
  command: string;
  args?: string[];
  workspacePath?: string;
  timeoutMs?: number;
}

class KiroCommandExecutor {
  private readonly baseUrl: string;
  private readonly apiKey?: string;

  constructor(baseUrl: string = 'http://localhost:3001', apiKey?: string) {
    this.baseUrl = baseUrl;
    this.apiKey = apiKey;
  }

  async executeCommand(options: ExecuteCommandOptions): Promise<ExecuteCommandResponse> {
    const headers: Record<string, string> = {
      'Content-Type': 'application/json',
    };

    if (this.apiKey) {
      headers['Authorization'] = `Bearer ${this.apiKey}`;
    }

    const controller = new AbortController();
    const timeoutId = setTimeout(() => controller.abort(), options.timeoutMs || 30000);

    try {
      const response = await fetch(`${this.baseUrl}/api/kiro/execute`, {
        method: 'POST',
        headers,
        body: JSON.stringify({
          command: options.command,
          args: options.args,
          workspacePath: options.workspacePath,
        }),
        signal: controller.signal,
      });

      if (!response.ok) {
        const errorData = await response.json();
        throw new Error(`HTTP ${response.status}: ${errorData.message || response.statusText}`);
      }

      return await response.json();
    } finally {
      clearTimeout(timeoutId);
    }
  }

  async executeWithRetry(
    options: ExecuteCommandOptions,
    maxRetries: number = 3,
    retryDelayMs: number = 1000
  ): Promise<ExecuteCommandResponse> {
    let lastError: Error;

    for (let attempt = 1; attempt <= maxRetries; attempt++) {
      try {
        return await this.executeCommand(options);
      } catch (error) {
        lastError = error as Error;
        
        // Don't retry validation errors
        if (error instanceof Error && error.message.includes('400')) {
          throw error;
        }

        if (attempt < maxRetries) {
          await new Promise(resolve => setTimeout(resolve, retryDelayMs * attempt));
        }
      }
    }

    throw lastError!;
  }
}

