package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/cairnstore/cairn/docs/samples"
)

// machines is a cluster of daemons begun from the sample files, as on three
// machines: 10.0.0.N becomes 127.0.0.N, and each has a directory of its own.
type machines struct {
	t    *testing.T
	dir  string
	port map[string]string // what stands in the samples → a port of this test
	run  map[string]*exec.Cmd
	said map[string]*bytes.Buffer // standard error of the last process of each name
}

func newMachines(t *testing.T) *machines {
	m := &machines{t: t, dir: dir(t), port: map[string]string{}, run: map[string]*exec.Cmd{}, said: map[string]*bytes.Buffer{}}
	ports, err := freePorts(6)
	if err != nil {
		t.Fatal(err)
	}
	for i, p := range []string{":7100", ":7101", ":7102", ":7110", ":7111", ":7112"} {
		m.port[p] = ports[i][strings.LastIndex(ports[i], ":"):]
	}
	t.Cleanup(func() {
		for name := range m.run {
			m.stop(name, syscall.SIGKILL)
		}
		for name, b := range m.said {
			if text := b.String(); t.Failed() { // after the stop nobody writes to it
				t.Logf("%s said:\n%s", name, text[max(0, len(text)-4000):])
			}
		}
	})
	return m
}

// config writes a daemon's file and returns its name.
func (m *machines) config(sample string, n int, more ...string) string {
	m.t.Helper()
	b, err := samples.Files.ReadFile(sample)
	if err != nil {
		m.t.Fatal(err)
	}
	text := string(b)
	kind, id := "meta", fmt.Sprintf("meta-%d", n)
	if sample == "host.toml" {
		kind, id = "host", fmt.Sprintf("host-%d", n)
	}
	// The node's own lines come before the first table.
	head, tables, _ := strings.Cut(text, "\n[")
	own := regexp.MustCompile(`10\.0\.0\.[14]:`)
	head = regexp.MustCompile(`(?m)^(api|raft|metrics|data|control)( .*)$`).ReplaceAllStringFunc(head, func(l string) string {
		return own.ReplaceAllString(l, fmt.Sprintf("127.0.0.%d:", n))
	})
	head = regexp.MustCompile(`"(meta|host)-[14]"`).ReplaceAllString(head, `"`+id+`"`)
	text = head + "\n"
	for _, line := range more {
		text += line + "\n"
	}
	if tables != "" {
		text += "\n[" + tables
	}
	text = strings.NewReplacer("10.0.0.", "127.0.0.", "/var/lib/cairn/"+kind, filepath.Join(m.dir, id), `"500G"`, `"2G"`, `rack = "r1"`, fmt.Sprintf("rack = %q", rackOf(n))).Replace(text)
	for from, to := range m.port {
		text = strings.ReplaceAll(text, from, to)
	}
	file := filepath.Join(m.dir, id+".toml")
	if err := os.MkdirAll(filepath.Join(m.dir, id), 0o700); err != nil {
		m.t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		m.t.Fatal(err)
	}
	if r := run(m.t, bin(m.t), "config", "check", file); r.status != 0 {
		m.t.Fatalf("%s made for %s: %s\n%s", sample, id, r.err, text)
	}
	return file
}

// rackOf is the rack of the n-th host: the fourth stands with the third.
func rackOf(n int) string { return fmt.Sprintf("r%d", min(n, 3)) }

// start runs a daemon and waits until it says that it is ready.
func (m *machines) start(name string) {
	m.t.Helper()
	kind, _, _ := strings.Cut(name, "-")
	cmd := exec.Command(bin(m.t), kind, "run", "--config", filepath.Join(m.dir, name+".toml"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		m.t.Fatal(err)
	}
	errs := &bytes.Buffer{}
	cmd.Stderr, m.said[name] = errs, errs
	if err := cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	m.run[name] = cmd
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		m.t.Fatalf("%s: %q %v\n%s", name, line, err, errs.String())
	}
}

func (m *machines) stop(name string, sig syscall.Signal) {
	m.t.Helper()
	cmd := m.run[name]
	if cmd == nil {
		return
	}
	delete(m.run, name)
	if err := cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		m.t.Errorf("%s: %v", name, err)
	}
	if err := cmd.Wait(); err != nil && sig == syscall.SIGTERM {
		m.t.Errorf("%s did not end well: %v", name, err)
	}
}

func (m *machines) addrs() string {
	var out []string
	for n := 1; n <= 3; n++ {
		out = append(out, fmt.Sprintf("127.0.0.%d%s", n, m.port[":7100"]))
	}
	return strings.Join(out, ",")
}

func (m *machines) cairn(args ...string) result {
	m.t.Helper()
	return run(m.t, bin(m.t), append(args, "--meta", m.addrs())...)
}

func (m *machines) ok(args ...string) string {
	m.t.Helper()
	r := m.cairn(args...)
	if r.status != 0 {
		m.t.Fatalf("cairn %v: status %d: %s", args, r.status, r.err)
	}
	return r.out
}

func (m *machines) fails(says string, args ...string) {
	m.t.Helper()
	if r := m.cairn(args...); r.status != exitFailed || !strings.Contains(r.err, says) {
		m.t.Fatalf("cairn %v: status %d, %q: want %d saying %q", args, r.status, r.err, exitFailed, says)
	}
}

// scrape returns the names of all metrics of a daemon.
func (m *machines) scrape(addr string, into map[string]bool) {
	m.t.Helper()
	rep, err := http.Get("http://" + addr + "/metrics")
	if err != nil {
		m.t.Fatal(err)
	}
	b, err := io.ReadAll(rep.Body)
	if err := errors.Join(err, rep.Body.Close()); err != nil || rep.StatusCode != http.StatusOK {
		m.t.Fatalf("metrics of %s: %s %v", addr, rep.Status, err)
	}
	for _, l := range strings.Split(string(b), "\n") {
		if name := regexp.MustCompile(`^cairn_[a-z_]+`).FindString(l); name != "" {
			into[name] = true
		}
	}
}

// Three machines are brought up from the sample files; a host joins with a
// token; a metadata node is added, all are restarted one after the other with no
// command failing, one is replaced; without a majority commands say who is
// missing while a guest's I/O goes on; every metric that an alert or the
// dashboard names is there.
func TestThreeMachinesFromTheSamples(t *testing.T) {
	m := newMachines(t)
	var wg sync.WaitGroup
	for n := 1; n <= 3; n++ {
		m.config("meta.toml", n)
		m.start(fmt.Sprintf("meta-%d", n))
	}
	for n := 1; n <= 2; n++ {
		m.config("host.toml", n)
		m.start(fmt.Sprintf("host-%d", n))
	}
	token := m.ok("host", "token")
	m.config("host.toml", 3)
	r := run(t, bin(t), "host", "run", "--config", filepath.Join(m.dir, "host-3.toml"))
	if r.status != exitFailed || !strings.Contains(r.err, "no join token") {
		t.Fatalf("a host without a token: %d %s", r.status, r.err)
	}
	m.config("host.toml", 3, fmt.Sprintf("join_token = %q", token))
	m.start("host-3")

	m.ok("volume", "create", "v", "--size", "512M")
	uri := m.ok("volume", "attach", "v")
	tool(t, "qemu-io", "-f", "raw", "-c", "write -P 7 0 1M", "-c", "read 0 1M", uri)

	metrics := map[string]bool{}
	for n := 1; n <= 3; n++ {
		m.scrape(fmt.Sprintf("127.0.0.%d%s", n, m.port[":7102"]), metrics)
		m.scrape(fmt.Sprintf("127.0.0.%d%s", n, m.port[":7112"]), metrics)
	}
	for _, file := range []string{"alerts.yml", "grafana.json"} {
		b, err := samples.Files.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range regexp.MustCompile(`cairn_[a-z_]+`).FindAllString(string(b), -1) {
			if !metrics[name] {
				t.Errorf("%s names %s, which no daemon has", file, name)
			}
		}
	}

	m.config("meta-join.toml", 4)
	m.start("meta-4")
	m.ok("meta", "add", "--api", "127.0.0.4"+m.port[":7100"])
	ctx, cancel := context.WithCancel(context.Background())
	var failed []string
	made := 0
	wg.Add(1)
	go func() { // an admin at work
		defer wg.Done()
		for ; ctx.Err() == nil; made++ {
			if r := m.cairn("volume", "create", fmt.Sprintf("r%d", made), "--size", "1G"); r.status != 0 {
				failed = append(failed, r.err)
			}
		}
	}()
	for n := 1; n <= 4; n++ { // an upgrade is this with another binary
		name := fmt.Sprintf("meta-%d", n)
		m.stop(name, syscall.SIGTERM)
		m.start(name)
		until(t, name+" follows again", func() bool {
			for _, x := range decodeJSON[[]metaView](t, m.ok("meta", "ls", "-o", "json")) {
				if x.Name == name && (x.State == "follower" || x.State == "leader") {
					return true
				}
			}
			return false
		})
	}
	cancel()
	wg.Wait()
	if len(failed) > 0 || made == 0 {
		t.Fatalf("of %d commands during the rolling restart %d failed: %v", made, len(failed), failed)
	}

	m.stop("meta-2", syscall.SIGKILL) // for good: its machine is lost
	m.ok("meta", "remove", "meta-2")
	until(t, "three nodes of one state", func() bool {
		ms := decodeJSON[[]metaView](t, m.ok("meta", "ls", "-o", "json"))
		return len(ms) == 3 && ms[0].StateHash == ms[1].StateHash && ms[0].StateHash == ms[2].StateHash
	})
	backup := filepath.Join(m.dir, "backup")
	m.ok("meta", "backup", backup)
	if r := run(t, bin(t), "meta", "restore", backup, "--check"); r.status != 0 || !strings.Contains(r.out, "whole; cluster garage") {
		t.Fatalf("the backup: %+v", r)
	}
	if r := run(t, bin(t), "meta", "restore", backup, "--config", filepath.Join(m.dir, "meta-1.toml")); r.status != exitFailed || !strings.Contains(r.err, "not empty") {
		t.Fatalf("a restore over data: %+v", r)
	}

	m.stop("meta-3", syscall.SIGKILL)
	m.stop("meta-4", syscall.SIGKILL)
	m.fails("has no leader: 2 of its 3 nodes must be up, and ", "volume", "create", "w", "--size", "1G")
	if r := m.cairn("volume", "create", "w", "--size", "1G"); !strings.Contains(r.err, "meta-3 (127.0.0.3") || !strings.Contains(r.err, "meta-4 (127.0.0.4") {
		t.Fatalf("who is missing: %s", r.err)
	}
	if r := m.cairn("status"); r.status != exitFailed || !strings.Contains(r.out, "writing where space is allocated") {
		t.Fatalf("status without a leader: %+v", r)
	}
	// Longer than a lease: the members confirm what is read.
	tool(t, "qemu-io", "-f", "raw", "-c", "write -P 8 64k 64k", "-c", "flush", "-c", "read -P 8 64k 64k", "-c", "read -P 7 0 64k", uri)
	m.start("meta-3")
	until(t, "it comes back by itself", func() bool { return m.cairn("volume", "create", "w", "--size", "1G").status == 0 })
	tool(t, "qemu-io", "-f", "raw", "-c", "read -P 8 64k 64k", "-c", "read -P 7 0 64k", uri)
	for _, name := range []string{"host-1", "host-2", "host-3", "meta-1", "meta-3"} {
		m.stop(name, syscall.SIGTERM)
		for line := range strings.Lines(m.said[name].String()) { // as the samples ask for
			var l struct{ Time, Level, Msg string }
			if err := json.Unmarshal([]byte(line), &l); err != nil || l.Time == "" || l.Level == "" || l.Msg == "" {
				t.Errorf("%s logs %q: %v", name, line, err)
			}
		}
	}
}
