# Get sync data
curl -H "Authorization: Bearer YOUR_TOKEN" \
https://kiro.sovereignroute.com/sync
# Push sync data
curl -X POST \
-H "Authorization: Bearer YOUR_TOKEN" \
-H "Content-Type: application/json" \
-d '{"conversations":{},"documents":{},"lastUpdate":1710338438173}' \
https://kiro.sovereignroute.com/sync
# Submit command
curl -X POST \
-H "Authorization: Bearer YOUR_TOKEN" \
-H "Content-Type: application/json" \
-d '{"type":"execute_bash","command":"uptime"}' \
https://kiro.sovereignroute.com/command
# Check command status
curl -H "Authorization: Bearer YOUR_TOKEN" \
https://kiro.sovereignroute.com/command/cmd-1710338480000-xyz789
