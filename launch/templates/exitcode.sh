"$@" &
child=$!
trap 'kill -TERM "$child" 2>/dev/null' TERM
while kill -0 "$child" 2>/dev/null; do
    wait "$child"
done
wait "$child"
code=$?
# The operator starts a pod again after an exit code from 128 on, and fails the job after any other.
case $code in 75 | 76) code=143 ;; esac
exit "$code"
