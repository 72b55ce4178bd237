package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"
)

const commandWait = 60 * time.Second

// bin is the program under test, built by `make test-int`.
func bin(t *testing.T) string {
	t.Helper()
	b := os.Getenv("CAIRN_BIN")
	if b == "" {
		t.Fatal("CAIRN_BIN names no cairn binary: run `make test-int`")
	}
	return b
}

// result is what a command left.
type result struct {
	out, err string
	status   int
}

func run(t *testing.T, name string, args ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), commandWait)
	defer cancel()
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("%s %v: %v", name, args, err)
	}
	return result{strings.TrimSpace(out.String()), strings.TrimSpace(errs.String()), cmd.ProcessState.ExitCode()}
}

// node is a running `cairn up`.
type node struct {
	t   *testing.T
	dir string
	cmd *exec.Cmd
}

// startUp starts a cluster and waits for its ready line.
func startUp(t *testing.T, dir string, args ...string) *node {
	t.Helper()
	n := &node{t: t, dir: dir, cmd: exec.Command(bin(t), append([]string{"up", "--dir", dir}, args...)...)}
	out, err := n.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var errs bytes.Buffer
	n.cmd.Stderr = &errs
	if err := n.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.kill() })
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || !strings.HasPrefix(line, "cairn is ready") {
		n.kill()
		t.Fatalf("cairn up: %q, %v\n%s", line, err, errs.String())
	}
	go func() { _, _ = io.Copy(io.Discard, out) }() // until it ends
	return n
}

func (n *node) kill() {
	if n.cmd.ProcessState != nil {
		return
	}
	if err := n.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		n.t.Error(err)
	}
	if err := n.cmd.Wait(); err != nil {
		n.t.Logf("cairn up ended: %v", err)
	}
}

// interrupt is Ctrl-C; the exit must be clean.
func (n *node) interrupt() {
	n.t.Helper()
	if err := n.cmd.Process.Signal(os.Interrupt); err != nil {
		n.t.Fatal(err)
	}
	if err := n.cmd.Wait(); err != nil {
		n.t.Fatalf("after Ctrl-C cairn up ended with %v", err)
	}
}

func (n *node) cairn(args ...string) result {
	n.t.Helper()
	return run(n.t, bin(n.t), append(args, "--dir", n.dir)...)
}

func (n *node) ok(args ...string) string {
	n.t.Helper()
	r := n.cairn(args...)
	if r.status != 0 {
		n.t.Fatalf("cairn %v: status %d: %s", args, r.status, r.err)
	}
	return r.out
}

// tool runs a program cairn did not write.
func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	r := run(t, name, args...)
	if r.status != 0 {
		t.Fatalf("%s %v: status %d: %s%s", name, args, r.status, r.out, r.err)
	}
	return r.out
}

func dir(t *testing.T) string {
	t.Helper()
	d, err := os.MkdirTemp("", "cairn-") // short: unix sockets live in it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(d); err != nil {
			t.Error(err)
		}
	})
	return filepath.Join(d, "c")
}

// A disk in two commands, used by other people's programs; Ctrl-C, up again:
// all data is there, at the same URI, without another attach.
func TestADiskForOtherPrograms(t *testing.T) {
	d := dir(t)
	n := startUp(t, d)
	n.ok("volume", "create", "v", "--size", "1G")
	uri := n.ok("volume", "attach", "v")
	if out := tool(t, "nbdinfo", "--size", uri); out != "1073741824" {
		t.Fatalf("nbdinfo: %s", out)
	}
	img := filepath.Join(filepath.Dir(d), "img")
	data := make([]byte, 32<<20)
	rng := rand.NewChaCha8([32]byte{1})
	if _, err := rng.Read(data); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(img, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(img, 1<<30); err != nil {
		t.Fatal(err)
	}
	tool(t, "nbdcopy", "--flush", img, uri)
	tool(t, "fio", "--name=v", "--verify_state_save=0", "--ioengine=nbd", "--uri="+uri, "--rw=randwrite", "--bs=4k", "--iodepth=32", "--offset=64m",
		"--size=16m", "--verify=crc32c", "--verify_fatal=1", "--end_fsync=1")
	var stored [][]string // offset, length, state: to the block
	for _, line := range strings.Split(tool(t, "nbdinfo", "--map", uri), "\n") {
		stored = append(stored, strings.Fields(line)[:3])
	}
	if want := [][]string{{"0", "33554432", "0"}, {"33554432", "33554432", "3"}, {"67108864", "16777216", "0"}, {"83886080", "989855744", "3"}}; !reflect.DeepEqual(stored, want) {
		t.Fatalf("nbdinfo --map says %v, not %v", stored, want)
	}
	n.interrupt()
	n = startUp(t, d)
	if err := os.Remove(img + ".back"); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	tool(t, "nbdcopy", uri, img+".back")
	back, err := os.ReadFile(img + ".back")
	if err != nil {
		t.Fatal(err)
	}
	if len(back) != 1<<30 || !bytes.Equal(back[:len(data)], data) {
		t.Fatalf("%d bytes came back and differ from what was written", len(back))
	}
	tool(t, "qemu-img", "info", uri)
	if out := n.ok("status"); !strings.HasPrefix(out, "healthy") {
		t.Fatalf("after a restart:\n%s", out)
	}
	n.ok("down")
	if err := n.cmd.Wait(); err != nil {
		t.Fatalf("after down: %v", err)
	}
}

// kill -9 of everything at once: what was flushed is there.
func TestKillOfTheWholeClusterKeepsData(t *testing.T) {
	d := dir(t)
	n := startUp(t, d)
	n.ok("volume", "create", "v", "--size", "64M")
	uri := n.ok("volume", "attach", "v")
	tool(t, "qemu-io", "-f", "raw", uri, "-c", "write -P 0x5a 1M 4M", "-c", "flush")
	n.kill()
	n = startUp(t, d)
	n.ok("volume", "attach", "v")
	if out := tool(t, "qemu-io", "-f", "raw", uri, "-c", "read -P 0x5a 1M 4M"); strings.Contains(out, "verification failed") {
		t.Fatal(out)
	}
}

// An image comes back as it went in, holes as holes.
func TestImportAndExport(t *testing.T) {
	d := dir(t)
	n := startUp(t, d, "--hosts", "1")
	img := filepath.Join(filepath.Dir(d), "img")
	if err := os.WriteFile(img, bytes.Repeat([]byte("cairn"), 100_001), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(img, 200<<20+4096); err != nil {
		t.Fatal(err)
	}
	n.ok("volume", "import", "v", img)
	n.ok("volume", "export", "v", img+".back")
	tool(t, "cmp", img, img+".back")
	if out := n.ok("volume", "show", "v", "-o", "json"); !strings.Contains(out, `"allocatedBytes": 67108864`) {
		t.Fatalf("200 MiB of zeros were allocated: %s", out)
	}
}

// An image that is not whole, or stands on another, is refused; one whose end is no
// block's is filled up with zeros; where there is no room nothing is left.
func TestBadImages(t *testing.T) {
	d := dir(t)
	n := startUp(t, d, "--hosts", "1")
	base := filepath.Dir(d)
	at := func(name string) string { return filepath.Join(base, name) }
	data := bytes.Repeat([]byte("cairn"), 1<<20)
	write := func(name string, b []byte) {
		t.Helper()
		if err := os.WriteFile(at(name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("odd", data[:3<<20+1])
	n.ok("volume", "import", "odd", at("odd"))
	if v := decodeJSON[volumeView](t, n.ok("volume", "show", "odd", "-o", "json")); v.SizeBytes != 3<<20+4096 {
		t.Fatalf("3 MiB and a byte became %d bytes", v.SizeBytes)
	}
	if got := n.image("odd"); !bytes.Equal(got[:3<<20+1], data[:3<<20+1]) || !isZero(got[3<<20+1:][:4095]) {
		t.Fatal("the odd image shows something else")
	}
	for _, format := range []string{"qcow2", "vmdk"} {
		whole, cut := at("whole."+format), "cut."+format
		tool(t, "qemu-img", "convert", "-f", "raw", "-O", format, at("odd"), whole)
		b, err := os.ReadFile(whole)
		if err != nil {
			t.Fatal(err)
		}
		write(cut, b[:len(b)/2])
		n.refuses("is damaged or cut short", "volume", "import", "x", at(cut))
	}
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", at("odd"), "-F", "raw", at("over.qcow2"))
	n.refuses("is only a part of an image, over "+at("odd"), "volume", "import", "x", at("over.qcow2"))
	tool(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", at("odd"), at("again"))
	if r := n.cairn("volume", "import", "odd", at("again")); r.status != exitFailed || !strings.Contains(r.err, "odd exists already") || strings.Contains(r.err, "converting") {
		t.Errorf("an import over another volume: %+v", r)
	}
	write("empty", nil)
	n.refuses("is empty", "volume", "import", "x", at("empty"))
	n.refuses("cannot read the image", "volume", "import", "x", at("none"))
	n.refuses("exists already", "volume", "import", "odd", at("odd"))
	n.refuses("exists: name a new file", "volume", "export", "odd", at("odd"))
	if err := os.Mkdir(at("small"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("cairn", at("small"), "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(at("small"), 0); err != nil {
			t.Error(err)
		}
	})
	n.refuses("no space left on device", "volume", "export", "odd", filepath.Join(at("small"), "x"))
	n.refuses("no space left on device", "volume", "backup", "odd", filepath.Join(at("small"), "repo"))
	left, err := filepath.Glob(filepath.Join(at("small"), "[^r]*"))
	if err != nil || len(left) > 0 {
		t.Fatalf("left on the full disk: %v, %v", left, err)
	}
	left, err = filepath.Glob(filepath.Join(at("small"), "repo", ".tmp", "*"))
	if err != nil || len(left) > 0 {
		t.Fatalf("left of the backup: %v, %v", left, err)
	}
	for _, v := range decodeJSON[[]volumeView](t, n.ok("volume", "ls", "-o", "json")) {
		if v.Name != "odd" || v.Holder != "" {
			t.Fatalf("left behind: %+v", v)
		}
	}
}

// An import for which there is no room ends, and gives back what it had taken.
func TestImportIntoAFullPool(t *testing.T) {
	d := dir(t)
	n := startUp(t, d, "--store-size", "1G")
	img := filepath.Join(filepath.Dir(d), "img")
	data := make([]byte, 500<<20)
	if _, err := rand.NewChaCha8([32]byte{4}).Read(data); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(img, data, 0o600); err != nil {
		t.Fatal(err)
	}
	n.ok("volume", "import", "a", img)
	n.refuses("no space", "volume", "import", "b", img)
	if vs := decodeJSON[[]volumeView](t, n.ok("volume", "ls", "-o", "json")); len(vs) != 1 || vs[0].Name != "a" {
		t.Fatalf("volumes after it: %+v", vs)
	}
}

// refuses runs a command that must fail with one sentence, saying something.
func (n *node) refuses(says string, args ...string) {
	n.t.Helper()
	if r := n.cairn(args...); r.status != exitFailed && r.status != exitUsage || !strings.Contains(r.err, says) || strings.Contains(r.err, "\n") {
		n.t.Fatalf("cairn %v: status %d, %q: want one sentence saying %q", args, r.status, r.err, says)
	}
}

// Every bad input gets one sentence and the right exit status.
func TestBadInput(t *testing.T) {
	d := dir(t)
	n := startUp(t, d, "--store-size", "1G")
	n.ok("volume", "create", "v", "--size", "64M")
	n.ok("volume", "attach", "v", "--host", "host-1")
	for _, c := range []struct {
		args   string
		status int
		say    string
	}{
		{"volume create x --size 10X", 2, "is not a size"},
		{"volume create x --size 1G --replicas many", 2, "no number"},
		{"volume show", 2, "takes NAME"},
		{"volume ls v", 2, "takes no argument"},
		{"volume ls -o yaml", 2, "table or json"},
		{"status --meta localhost", 2, "not host:port"},
		{"volume snapshot rm v@nope", 1, "snapshot ls v"},
		{"volume create x --size 0", 2, "not possible"},
		{"volume create x --size 1000", 2, "multiple of 4096"},
		{"volume create x", 2, "size"},
		{"volume create Bad_Name --size 1G", 2, "is not a name"},
		{"volume create v --size 64M", 1, "exists already"},
		{"volume create x --size 5G", 1, "can never be filled"},
		{"volume create x --size 64M --replicas 4", 1, "4 replicas need 4 failure domains"},
		{"volume create x --size 64M --replicas 9", 2, "1 to 5"},
		{"volume create x --size 64M --domain shelf", 2, "not a failure domain"},
		{"volume show nope", 1, "no volume"},
		{"volume attach nope", 1, "no volume"},
		{"volume attach v --host nowhere", 1, "no host"},
		{"volume attach v --host host-2", 1, "held by host host-1"},
		{"volume rm v", 1, "detach it first"},
		{"volume undo-shrink v", 1, "no shrink"},
		{"volume resize v --size 0", 2, "size"},
		{"volume import y /nonexistent", 1, "cannot read the image"},
		{"volume fly v", 2, "no command"},
		{"vm start nope", 1, "no VM"},
		{"vm create m --volume nope", 1, "no volume"},
		{"up", 1, "already up"},
		{"up --hosts 0", 2, "1 to 64"},
		{"status -o yaml", 2, "table or json"},
		{"config check /nonexistent", 1, "no configuration file"},
	} {
		r := n.cairn(strings.Fields(c.args)...)
		if r.status != c.status || !strings.Contains(r.err, c.say) || strings.Count(r.err, "\n") > 0 {
			t.Errorf("cairn %s: status %d, %q; want status %d and one line with %q", c.args, r.status, r.err, c.status, c.say)
		}
	}
	if out := n.ok("volume", "ls", "-o", "json"); strings.Count(out, `"name"`) != 1 {
		t.Errorf("bad input made volumes: %s", out)
	}
}

// A cluster that cannot be started says why and is left as it was.
func TestBadDirectories(t *testing.T) {
	d := dir(t)
	n := startUp(t, d, "--hosts", "1", "--meta-nodes", "1")
	n.ok("volume", "create", "v", "--size", "64M", "--replicas", "1")
	n.ok("down")
	if err := n.cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	refused := func(what, say string) {
		t.Helper()
		if r := run(t, bin(t), "up", "--dir", d); r.status != 1 || !strings.Contains(r.err, say) {
			t.Errorf("%s: status %d, %q; want %q", what, r.status, r.err, say)
		}
	}
	spoil := func(path, old, new string) func() {
		t.Helper()
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Contains(b, []byte(old)) {
			t.Fatalf("%s has no %q", path, old)
		}
		if err := os.WriteFile(path, bytes.Replace(b, []byte(old), []byte(new), 1), 0o600); err != nil {
			t.Fatal(err)
		}
		return func() {
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	mend := spoil(filepath.Join(d, "cluster.json"), `"version": 1`, `"version": 7`)
	refused("another version", "of version 7")
	mend()
	mend = spoil(filepath.Join(d, "cluster.json"), `{`, `[`)
	refused("a damaged description", "damaged")
	mend()

	sock := filepath.Join(d, "host-1", "nbd.sock")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	refused("an occupied socket", "nbd.sock")
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}

	f, err := os.OpenFile(filepath.Join(d, "host-1", "store-1"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	head := make([]byte, 64<<10)
	if _, err := f.ReadAt(head, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(make([]byte, len(head)), 0); err != nil {
		t.Fatal(err)
	}
	refused("a corrupt superblock", "store-1")
	if _, err := f.WriteAt(head, 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	n = startUp(t, d)
	if out := n.ok("volume", "ls"); !strings.Contains(out, "v ") {
		t.Errorf("the volume is gone: %s", out)
	}

	other := filepath.Join(filepath.Dir(d), "full")
	if err := os.Mkdir(other, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(other, "mine"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if r := run(t, bin(t), "up", "--dir", other); r.status != 1 || !strings.Contains(r.err, "mine") {
		t.Errorf("a directory with other people's files: status %d, %q", r.status, r.err)
	}
}

// A client that sends garbage loses its connection, nobody else's.
func TestGarbageHarmsOnlyItsSender(t *testing.T) {
	d := dir(t)
	n := startUp(t, d, "--hosts", "1")
	n.ok("volume", "create", "v", "--size", "64M")
	uri := n.ok("volume", "attach", "v")
	l, err := openCluster(d)
	if err != nil {
		t.Fatal(err)
	}
	addrs := [][2]string{{"unix", filepath.Join(d, "host-1", "nbd.sock")}, {"tcp", l.Hosts[0].Data}, {"tcp", l.Hosts[0].Control}, {"tcp", l.Meta[0].API}, {"tcp", l.Meta[0].Raft}}
	for i, a := range addrs {
		c, err := net.Dial(a[0], a[1])
		if err != nil {
			t.Fatal(err)
		}
		junk := make([]byte, 1<<20)
		rng := rand.NewChaCha8([32]byte{byte(i)})
		if _, err := rng.Read(junk); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write(junk); err != nil && !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.ECONNRESET) {
			t.Fatal(err)
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
	}
	tool(t, "qemu-io", "-f", "raw", uri, "-c", "write -P 1 0 64k", "-c", "read -P 1 0 64k")
	if out := n.ok("status"); !strings.HasPrefix(out, "healthy") {
		t.Errorf("after garbage:\n%s", out)
	}
}
