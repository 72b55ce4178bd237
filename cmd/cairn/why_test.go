package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestWhyAndStats: a replica that stands still for a moment is found by name.
func TestWhyAndStats(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "c")
	n := startUp(t, dir, "--processes")
	n.ok("volume", "create", "v", "--size", "64M", "--replicas", "3")
	if r := n.cairn("why", "--volume", "v"); r.status != 1 || !strings.Contains(r.err, "not attached") {
		t.Errorf("why of a volume nobody uses: %+v", r)
	}
	uri := n.ok("volume", "attach", "v", "--host", "host-1")
	tool(t, "qemu-io", "-f", "raw", uri, "-c", "write 0 4M", "-c", "flush")
	pid := hostPid(t, dir, "host-3")
	load := make(chan result, 1)
	go func() {
		load <- run(t, "qemu-img", "bench", "-f", "raw", "-w", "-t", "none", "-c", "20000", "-d", "4", "-s", "4k", uri)
	}()
	done := func() uint64 {
		var st statsView
		if err := json.Unmarshal([]byte(n.ok("volume", "stats", "v", "-o", "json")), &st); err != nil {
			t.Fatal(err)
		}
		for _, o := range st.Ops {
			if o.Op == "write" {
				return o.Done
			}
		}
		return 0
	}
	for end := time.Now().Add(commandWait); done() < 500; {
		if time.Now().After(end) {
			t.Fatal("the load does not run")
		}
	}
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	stopped := time.Now()
	for time.Since(stopped) < 400*time.Millisecond { // below the limit of exclusion
		time.Sleep(10 * time.Millisecond)
	}
	if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if r := <-load; r.status != 0 {
		t.Fatalf("qemu-img bench: %+v", r)
	}
	var ws []slowView
	if err := json.Unmarshal([]byte(n.ok("why", "--volume", "v", "-o", "json")), &ws); err != nil {
		t.Fatal(err)
	}
	found := false
	for i := range ws {
		w := &ws[i]
		l := w.slowest()
		_, us := w.stages()
		sum := us[0] + us[1] + us[2] + us[3] + us[4]
		if sum > w.TotalUs+1000 || sum+1000 < w.TotalUs {
			t.Errorf("the stages of %+v add up to %d µs", w, sum)
		}
		found = found || w.Op == "write" && l.Host == "host-3" && l.TimeUs > 200_000
	}
	if !found || len(ws) == 0 {
		t.Errorf("no write waited for host-3: %+v", ws)
	}
	r := n.cairn("why", "--volume", "v", "--top", "4")
	if r.status != 0 || !strings.Contains(r.out, "host-3") || !strings.Contains(r.err, " of host-3") || len(strings.Split(r.out, "\n")) != 5 {
		t.Errorf("why: %s\n%s", r.out, r.err)
	}
	t.Logf("\n%s\n%s\n%s", r.out, r.err, n.ok("volume", "stats", "v"))
	if got := done(); got < 20000 {
		t.Errorf("%d writes are counted", got)
	}
}

// hostPid is the process id of a host of a cluster with a process each.
func hostPid(t *testing.T, dir, host string) int {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, "run", host+".pid"))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}
