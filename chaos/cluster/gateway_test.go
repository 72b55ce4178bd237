package cluster

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/cairnstore/cairn/chaos/check"
)

// gatewayKillsEnv says how often the gateway's process is killed; 100 is what
// the promise is about.
const gatewayKillsEnv = "CAIRN_GATEWAY_KILLS"

// The gateway's own process is killed, again and again, under a verified load
// whose client must not notice more than a pause: QEMU's block layer, which
// reconnects (reconnect-delay), and our own client that dials again.
func TestGatewayKilled(t *testing.T) {
	kills := 5
	if s := os.Getenv(gatewayKillsEnv); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 {
			t.Fatalf("%s=%q is no number of kills", gatewayKillsEnv, s)
		}
		kills = n
	}
	c := startCluster(t)
	uri := startVolume(t, c)
	t.Run("qemu-storage-daemon", func(t *testing.T) {
		killGateway(t, c, check.NBD(storageDaemon(t, filepath.Join(c.Dir(), gateway, "nbd.sock")), nil), areaBase, kills)
	})
	t.Run("own client", func(t *testing.T) {
		killGateway(t, c, check.PatientNBD(uri, testMaxWait), 2*chunkBytes, (kills+1)/2)
	})
}

func killGateway(t *testing.T, c *Cluster, dial func(context.Context) (check.Device, error), base int64, kills int) {
	l := check.NewLoad(check.Config{Dial: dial, Seed: 31, Base: base, Blocks: areaBlocks, Conns: 1, Depth: 8, Log: t.Logf})
	stop, done := start(t.Context(), l)
	var stalls []time.Duration
	for n := range kills {
		awaitOps(t, l, done, 500)
		from := l.History().NowNs()
		if err := c.Kill(gateway); err != nil { // its supervisor starts it again
			t.Fatal(err)
		}
		awaitOps(t, l, done, 200) // some are answered before the kill is felt
		stalls = append(stalls, l.History().Longest(from, l.History().NowNs()))
		t.Logf("kill %d of %d: longest operation %v", n+1, kills, stalls[n].Round(time.Millisecond))
		waitInSync(t, c)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	st := l.Stats()
	for _, k := range st.Kinds {
		if k.Unknown+k.Refused > 0 {
			t.Errorf("%s: %d cut off, %d refused", k.Kind, k.Unknown, k.Refused)
		}
	}
	if st.Reconnects > 0 {
		t.Errorf("the client saw %d lost connections", st.Reconnects)
	}
	readAll(t, l)
	linearizable(t, l)
	slices.Sort(stalls)
	t.Logf("%d kills: longest operation %v at the median, %v at p95, %v at most", kills,
		stalls[len(stalls)/2].Round(time.Millisecond), stalls[len(stalls)*95/100].Round(time.Millisecond), stalls[len(stalls)-1].Round(time.Millisecond))
}

// storageDaemon runs qemu-storage-daemon between the volume's socket and a
// socket of its own until the test ends, and returns the URI of the latter.
func storageDaemon(t *testing.T, socket string) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "qsd")
	if err != nil {
		t.Fatal(err)
	}
	own := filepath.Join(dir, "s")
	cmd := exec.Command("qemu-storage-daemon", "--blockdev", "driver=nbd,node-name=n,server.type=unix,server.path="+socket+",export="+volumeName+",reconnect-delay=120,discard=unmap",
		"--nbd-server", "addr.type=unix,addr.path="+own, "--export", "type=nbd,id=e,node-name=n,name="+volumeName+",writable=on")
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // it ends with the thread that starts it
	started, ended := make(chan error), make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			ended <- cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		t.Fatalf("qemu-storage-daemon: %v", err)
	}
	t.Cleanup(func() {
		if err := cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
			t.Error(err)
		}
		var exit *exec.ExitError
		if err := <-ended; err != nil && !errors.As(err, &exit) {
			t.Error(err)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	for end := time.Now().Add(testMaxWait); ; time.Sleep(pollEvery) {
		nc, err := net.Dial("unix", own)
		if err == nil {
			if err := nc.Close(); err != nil {
				t.Fatal(err)
			}
			return "nbd+unix:///" + volumeName + "?socket=" + own
		}
		if time.Now().After(end) {
			t.Fatalf("qemu-storage-daemon does not serve: %v", err)
		}
	}
}
