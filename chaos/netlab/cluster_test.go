package netlab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cairnstore/cairn/chaos/check"
	"github.com/cairnstore/cairn/netplane/bird"
	"github.com/cairnstore/cairn/proto/status"
)

const (
	volume      = "v"
	volumeBytes = 256 << 20
)

// world is a cluster in a lab with a volume of three replicas on host-1.
type world struct {
	t *testing.T
	*Lab
	c  *Cluster
	io *check.Load // runs again and again: what one wrote the next must find
}

func newWorldOf(t *testing.T, cfg Config) *world {
	t.Helper()
	bin := os.Getenv("CAIRN_BIN")
	if bin == "" {
		t.Fatal("CAIRN_BIN names no cairn binary: run by `make test-int`")
	}
	cfg.Dir, cfg.Bare = t.TempDir(), true
	l, err := New(cfg)
	must(t, err)
	t.Cleanup(func() { must(t, l.Close()) })
	c, err := l.StartCluster(t.Context(), bin)
	must(t, err)
	w := &world{t: t, Lab: l, c: c}
	t.Cleanup(func() {
		if t.Failed() {
			w.logs()
		}
		must(t, c.Close())
	})
	converge(t, l)
	w.cairn("volume", "create", volume, "--size", fmt.Sprint(volumeBytes), "--replicas", "3")
	w.cairn("volume", "attach", volume, "--host", "host-1")
	w.io = check.NewLoad(check.Config{Dial: check.NBD("nbd+unix:///"+volume+"?socket="+c.NBD(1), nil), Seed: 1, Blocks: 512, Depth: 8, Rate: 1500})
	return w
}

// logs prints the end of every process's log.
func (w *world) logs() {
	for _, p := range w.c.procs {
		b, err := os.ReadFile(w.c.log(p.name))
		if err != nil {
			w.t.Log(err)
		}
		w.t.Logf("%s: …%s", p.name, b[max(0, len(b)-3000):])
	}
}

func (w *world) cairn(args ...string) string {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	out, err := w.c.Cairn(ctx, args...)
	must(w.t, err)
	return out
}

// members is the volume's revision and how many members are in sync.
func (w *world) members() (revision uint64, inSync int) {
	w.t.Helper()
	v, err := w.c.volume(context.Background(), volume)
	must(w.t, err)
	for _, m := range v.Members {
		if m.InSync {
			inSync++
		}
	}
	return v.Revision, inSync
}

// problems is what status says is wrong.
func (w *world) problems() string {
	w.t.Helper()
	var v struct{ Problems []string }
	must(w.t, json.Unmarshal([]byte(w.cairn("status", "-o", "json")), &v))
	return strings.Join(v.Problems, "; ")
}

// answered is how many operations the load has done.
func (w *world) answered() (n int) {
	for _, k := range w.io.Stats().Kinds {
		n += k.Count
	}
	return n
}

// during runs a load, does something in its midst, and returns the longest
// operation. Every operation must succeed and every byte be right.
func (w *world) during(what string, act func()) time.Duration {
	w.t.Helper()
	since := len(w.io.History().Ops())
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- w.io.Run(ctx) }()
	more := func(n int) {
		at := w.answered() + n
		await(w.t, "I/O "+what, func() bool { return w.answered() >= at || len(ended) > 0 })
	}
	more(300)
	act()
	more(1500)
	cancel()
	if err := <-ended; err != nil {
		w.t.Errorf("%s: %v", what, err)
	}
	d := slowest(w.io.History(), since)
	w.t.Logf("%s: longest operation %v", what, d)
	return d
}

// Whatever single link or spine is cut, and with whatever protocol: no error,
// no exclusion, and the cause is told from others. Everything is in sync all the
// while: what a path loses, another carries.
func TestStorageRidesOutCuts(t *testing.T) {
	protocols := []bird.Protocol{bird.BGP}
	if os.Getenv("CAIRN_NET_LONG") != "" {
		protocols = []bird.Protocol{bird.BGP, bird.Static, bird.RIP, bird.OSPF}
	}
	for _, p := range protocols {
		t.Run(string(p), func(t *testing.T) {
			w := newWorldOf(t, Config{Spines: 2, Hosts: 3, Protocol: p})
			w.during("calm", func() {})
			before, inSync := w.members()
			if inSync != 3 {
				t.Fatalf("%d members in sync at the beginning", inSync)
			}
			for _, c := range []struct{ do, part, tells string }{
				{"cut", "host-2:spine-1", "link s1 of host host-2 to spine-1 is"},
				{"cut", "host-1:spine-2", "link s2 of host host-1 to spine-2 is"},
				{"silence", "spine-1", "spine spine-1 passes nothing on"},
				{"silence", "spine-2", "spine spine-2 passes nothing on"},
				{"drop-data", "spine-1", "spine spine-1 passes nothing on"},
				{"drop-data", "spine-2", "spine spine-2 passes nothing on"},
				{"cut", "spine-2", "to spine-2 is"},
			} {
				what := c.do + " " + c.part
				stall := w.during(what, func() { must(t, w.Do(c.do, c.part)) })
				if stall > maxStall {
					t.Errorf("%s: an operation took %v, more than %v", what, stall, maxStall)
				}
				await(t, what+" told by status", func() bool { return strings.Contains(w.problems(), c.tells) })
				must(t, w.Do("heal", "all"))
				await(t, "status well after "+what, func() bool { return w.problems() == "" })
				if revision, inSync := w.members(); revision != before || inSync != 3 {
					t.Errorf("%s: members changed from revision %d to %d, %d in sync", what, before, revision, inSync)
				}
			}
			w.isolated(before)
			w.commands()
			w.killed()
			must(t, check.Linearizable(context.Background(), w.io.History()))
			w.kept()
		})
	}
}

// isolated cuts a host off: no path leads to it, so it is excluded, comes back,
// and nothing meant for it has left by another network.
func (w *world) isolated(before uint64) {
	w.t.Helper()
	w.during("cut host-3", func() { must(w.t, w.Do("cut", "host-3")) })
	await(w.t, "the loss of host-3 told by status", func() bool { return strings.Contains(w.problems(), "host host-3: no path leads to it") })
	if revision, inSync := w.members(); revision == before || inSync != 2 {
		w.t.Errorf("a host that is cut off: revision %d as before, %d in sync", revision, inSync)
	}
	must(w.t, w.Do("heal", "all"))
	await(w.t, "host-3 in sync again", func() bool { _, n := w.members(); return n == 3 })
	converge(w.t, w.Lab)
	await(w.t, "status well after a host was cut off", func() bool { return w.problems() == "" })
}

// killed ends a host's process, its routing daemon with it; the next one takes
// over what it left and all is as before.
func (w *world) killed() {
	w.t.Helper()
	w.during("kill -9 of host-2", func() { must(w.t, w.c.Kill(context.Background(), 2)) })
	await(w.t, "host-2 in sync again", func() bool { _, n := w.members(); return n == 3 })
	converge(w.t, w.Lab)
	await(w.t, "status well after a kill", func() bool { return w.problems() == "" })
}

// commands are those people look and act with, against a real cluster.
func (w *world) commands() {
	w.t.Helper()
	svg := filepath.Join(w.t.TempDir(), "net.svg")
	show := w.cairn("net", "show", "--svg", svg)
	for _, want := range []string{"the storage network is well", "SPINE-1", "10.101.1.1/31", "host-2", "in use"} {
		if !strings.Contains(show, want) {
			w.t.Errorf("net show has no %q:\n%s", want, show)
		}
	}
	if b, err := os.ReadFile(svg); err != nil || !strings.Contains(string(b), ">spine-2<") {
		w.t.Errorf("the picture: %v\n%s", err, b)
	}
	w.cairn("route", "add", "--host", "host-2", "10.255.0.99", "via", "10.101.2.0", "dev", "s1")
	if ls := w.cairn("route", "ls", "host-2"); !strings.Contains(ls, "10.255.0.99/32") {
		w.t.Errorf("route ls after route add:\n%s", ls)
	}
	w.cairn("route", "rm", "--host", "host-2", "10.255.0.99")
	if ls := w.cairn("route", "ls", "host-2"); strings.Contains(ls, "10.255.0.99") {
		w.t.Errorf("route ls after route rm:\n%s", ls)
	}
	var last uint64
	for line := range strings.Lines(w.cairn("route", "watch", "--once", "-o", "json", "host-2")) {
		var e struct {
			Seq               uint64
			Node, What, Cause string
		}
		must(w.t, json.Unmarshal([]byte(line), &e))
		if e.Seq <= last || e.Node != "host-2" || e.What == "" {
			w.t.Errorf("event %+v after #%d", e, last)
		}
		last = e.Seq
	}
	if last == 0 {
		w.t.Error("no events")
	}
	for _, bad := range [][]string{{"route", "add", "--host", "host-2", "10.255.0.99", "via", "10.101.2.0", "dev", "nowhere"},
		{"route", "rm", "--host", "host-2", "10.255.0.1"}, {"route", "ls", "host-9"}} {
		if out, err := w.c.Cairn(context.Background(), bad...); err == nil {
			w.t.Errorf("%v was done: %s", bad, out)
		}
	}
}

// kept checks that no byte has left the storage network, and that it would have
// been seen.
func (w *world) kept() {
	w.t.Helper()
	for h := 1; h <= w.cfg.Hosts; h++ {
		if n, err := w.Leaked(fmt.Sprintf("host-%d", h)); err != nil || n != 0 {
			w.t.Errorf("host-%d sent %d packets beside the storage network (%v)", h, n, err)
		}
	}
	must(w.t, w.In("host-1", func() error {
		c, err := net.Dial("udp", "203.0.113.1:9")
		if err != nil {
			return err
		}
		_, err = c.Write([]byte("x"))
		return errors.Join(err, c.Close())
	}))
	if n, err := w.Leaked("host-1"); err != nil || n != 1 {
		w.t.Errorf("one packet was sent on purpose, %d counted (%v)", n, err)
	}
}

// maxStall is more than any cut takes (1 s on an idle machine) and less than
// what a replica's exclusion and return would.
const maxStall = 5 * time.Second

// Processes that do not end are ended, however many.
func TestHungProcessesAreEnded(t *testing.T) {
	c := &Cluster{lab: &Lab{cfg: Config{Dir: t.TempDir()}}, wait: time.Millisecond}
	for i := range 3 {
		p := &proc{name: fmt.Sprintf("host-%d", i+1), cmd: exec.Command("sh", "-c", "trap '' TERM; echo; while :; do sleep 1; done"), ended: make(chan struct{})}
		p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		out, err := p.cmd.StdoutPipe()
		must(t, err)
		must(t, p.cmd.Start())
		if _, err := out.Read(make([]byte, 1)); err != nil { // it ignores SIGTERM from now on
			t.Fatal(err)
		}
		go func() { p.err = p.cmd.Wait(); close(p.ended) }()
		c.procs = append(c.procs, p)
	}
	if err := c.Close(); !errors.Is(err, status.Timeout) {
		t.Errorf("got %v", err)
	}
}
