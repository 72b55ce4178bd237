package server_test

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/cairnstore/cairn/nbd/server"
)

// tool runs a program of somebody else's and returns its stdout. `make deps`
// installs them all; one that is missing fails the test.
func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, stderr, err := attempt(t, name, args...)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, out, stderr)
	}
	return out
}

func attempt(t *testing.T, name string, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	var o, e bytes.Buffer
	cmd.Stdout, cmd.Stderr, cmd.Dir = &o, &e, t.TempDir()
	err = cmd.Run()
	return o.String(), e.String(), err
}

func wantText(t *testing.T, text string, patterns ...string) {
	t.Helper()
	for _, p := range patterns {
		if !regexp.MustCompile(p).MatchString(text) {
			t.Errorf("no %q in:\n%s", p, text)
		}
	}
}

// image makes a file of 20 MiB, half of it holes, in pieces of 1 MiB.
func image(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	f, err := os.Create(path)
	must(t, err)
	must(t, f.Truncate(20<<20))
	for i := int64(0); i < 20; i += 2 {
		_, err := f.WriteAt(random(1<<20, uint64(i)), i<<20)
		must(t, err)
	}
	must(t, f.Close())
	return path
}

func TestNBDInfo(t *testing.T) {
	ro := newMemory(1 << 20)
	ro.readOnly = true
	s := serve(t, server.Config{Exports: exports{"v": newMemory(20 << 20), "ro": ro}})
	for _, uri := range []string{s.uri("v"), s.tcpURI("v")} {
		wantText(t, tool(t, "nbdinfo", uri), `export-size: 20971520`, `uri: nbd`, `block_size_minimum: 1\b`,
			`block_size_preferred: 4096`, `block_size_maximum: 33554432`, `base:allocation`, `using structured packets`)
		wantText(t, tool(t, "nbdinfo", "--size", uri), `^20971520\n$`)
		for _, can := range []string{"connect", "cache", "df", "fast-zero", "flush", "fua", "multi-conn", "read", "trim", "write", "zero", "structured-reply"} {
			if _, stderr, err := attempt(t, "nbdinfo", "--can", can, uri); err != nil {
				t.Errorf("--can %s: %v %s", can, err, stderr)
			}
		}
	}
	for _, not := range []string{"write", "trim", "zero"} {
		if _, _, err := attempt(t, "nbdinfo", "--can", not, s.uri("ro")); err == nil {
			t.Errorf("a read-only export says that it can %s", not)
		}
	}
	if _, _, err := attempt(t, "nbdinfo", "--is", "readonly", s.uri("ro")); err != nil {
		t.Errorf("--is readonly: %v", err)
	}
	wantText(t, tool(t, "nbdinfo", "--list", s.uri("")), `export="v"`, `export="ro"`)
	if _, stderr, err := attempt(t, "nbdinfo", s.uri("nothing")); err == nil || !strings.Contains(stderr, "No such file") {
		t.Errorf("an unknown export: %v %s", err, stderr)
	}
}

// TestNBDCopy copies there and back over several connections, and nbdinfo's
// map shows the holes that nbdcopy left.
func TestNBDCopy(t *testing.T) {
	m := newMemory(20 << 20)
	s := serve(t, server.Config{Exports: exports{"v": m}})
	in, out := image(t), filepath.Join(t.TempDir(), "out")
	tool(t, "nbdcopy", "--connections=4", "--requests=64", "--flush", in, s.uri("v"))
	if _, flushes := m.counts(); flushes == 0 {
		t.Error("nbdcopy --flush did not flush")
	}
	want, err := os.ReadFile(in)
	must(t, err)
	if !bytes.Equal(m.at(0, 20<<20), want) {
		t.Fatal("nbdcopy wrote something else")
	}
	tool(t, "nbdcopy", "--connections=4", s.tcpURI("v"), out)
	got, err := os.ReadFile(out)
	must(t, err)
	if !bytes.Equal(got, want) {
		t.Fatal("nbdcopy read something else")
	}
	var spans []struct {
		Offset, Length, Type uint64
	}
	must(t, json.Unmarshal([]byte(tool(t, "nbdinfo", "--map", "--json", s.uri("v"))), &spans))
	if len(spans) != 20 || spans[1].Type != 3 || spans[1].Offset != 1<<20 || spans[1].Length != 1<<20 || spans[0].Type != 0 {
		t.Errorf("the map is %v", spans)
	}
}

func TestQEMUImg(t *testing.T) {
	m := newMemory(20 << 20)
	s := serve(t, server.Config{Exports: exports{"v": m}})
	in := image(t)
	for _, uri := range []string{s.uri("v"), s.tcpURI("v")} {
		wantText(t, tool(t, "qemu-img", "info", uri), `virtual size: 20 MiB`)
		tool(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "-W", in, uri)
		tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", in, uri)
		var spans []struct {
			Start, Length uint64
			Data          bool
		}
		must(t, json.Unmarshal([]byte(tool(t, "qemu-img", "map", "--output=json", "-f", "raw", uri)), &spans))
		if len(spans) != 20 || !spans[0].Data || spans[1].Data {
			t.Errorf("qemu-img map: %+v", spans)
		}
		_, err := m.write([]byte{1}, 5<<20)
		must(t, err)
		if out, _, err := attempt(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", in, uri); err == nil || !strings.Contains(out, "Content mismatch") {
			t.Errorf("qemu-img compare finds no difference: %s", out)
		}
	}
	tool(t, "qemu-img", "bench", "-f", "raw", "-c", "3000", "-d", "32", "-s", "4k", "-t", "none", s.uri("v"))
	tool(t, "qemu-img", "bench", "-f", "raw", "-c", "3000", "-d", "32", "-s", "4k", "-w", "--flush-interval", "100", "-t", "none", s.uri("v"))
	copied := filepath.Join(t.TempDir(), "copy.qcow2")
	tool(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", s.uri("v"), copied)
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", s.uri("v"), copied)
}

func TestQEMUIO(t *testing.T) {
	m := newMemory(20 << 20)
	s := serve(t, server.Config{Exports: exports{"v": m}})
	script := []string{"write -P 0x5a 1M 3M", "write -f -P 0x77 1000 10", "writev -P 0x33 8M 64k 4k", "read -P 0x5a 1M 3M", "read -P 0x77 1000 10",
		"discard 2M 1M", "read -P 0 2M 1M", "write -z -u 1M 512k", "read -P 0 1M 512k", "write -z 9M 2M", "read -P 0 9M 2M", "aio_write -P 1 12M 1M", "aio_write -P 2 13M 1M",
		"aio_flush", "read -P 1 12M 1M", "read -P 2 13M 1M", "flush", "map"}
	args := []string{"-f", "raw"}
	for _, c := range script {
		args = append(args, "-c", c)
	}
	out := tool(t, "qemu-io", append(args, s.uri("v"))...)
	if strings.Contains(out, "verification failed") || strings.Contains(out, "failed:") {
		t.Errorf("qemu-io:\n%s", out)
	}
	if fua, flushes := m.counts(); fua == 0 || flushes == 0 {
		t.Errorf("%d FUA writes and %d flushes have come", fua, flushes)
	}
	if m.Extents(9<<20, 1)[0].Hole {
		t.Error("zeros that were not to be a hole are one")
	}
}

func TestFio(t *testing.T) {
	s := serve(t, server.Config{Exports: exports{"v": newMemory(20 << 20)}})
	for _, job := range [][]string{
		{"--iodepth=1", "--bs=4k", "--io_size=4m"},
		{"--iodepth=32", "--bs=4k", "--io_size=20m"},
		{"--iodepth=128", "--bsrange=512-256k", "--blockalign=512", "--io_size=20m"},
	} {
		args := append([]string{"--name=t", "--ioengine=nbd", "--uri=" + s.uri("v"), "--rw=randwrite", "--size=20m", "--verify=crc32c", "--verify_fatal=1",
			"--fsync=50", "--randseed=7", "--output-format=json"}, job...)
		report := filepath.Join(t.TempDir(), "report")
		tool(t, "fio", append(args, "--output="+report)...)
		text, err := os.ReadFile(report)
		must(t, err)
		var res struct{ Jobs []struct{ Error int } }
		must(t, json.Unmarshal(text[bytes.IndexByte(text, '{'):], &res))
		if len(res.Jobs) != 1 || res.Jobs[0].Error != 0 {
			t.Errorf("fio %v: %+v", job, res)
		}
	}
}

// TestStorageDaemonMirror lets QEMU mirror one export into another.
func TestStorageDaemonMirror(t *testing.T) {
	from, to := newMemory(20<<20), newMemory(20<<20)
	s := serve(t, server.Config{Exports: exports{"from": from, "to": to}})
	_, err := from.write(random(5<<20, 9), 3<<20)
	must(t, err)
	script := filepath.Join(t.TempDir(), "qmp")
	must(t, os.WriteFile(script, []byte(`
from=$1 to=$2 dir=$3
coproc qemu-storage-daemon --chardev stdio,id=q --monitor chardev=q \
  --blockdev "nbd,node-name=from,server.type=unix,server.path=$dir,export=from" \
  --blockdev "nbd,node-name=to,server.type=unix,server.path=$dir,export=to"
say() { echo "$1" >&"${COPROC[1]}"; }
say '{"execute":"qmp_capabilities"}'
say '{"execute":"blockdev-mirror","arguments":{"job-id":"j","device":"from","target":"to","sync":"full"}}'
while read -r line <&"${COPROC[0]}"; do
  case $line in
    *BLOCK_JOB_READY*) say '{"execute":"block-job-complete","arguments":{"device":"j"}}' ;;
    *BLOCK_JOB_COMPLETED*) echo "$line"; say '{"execute":"quit"}'; break ;;
    *'"error"'*) echo "$line"; say '{"execute":"quit"}'; break ;;
  esac
done
wait
`), 0o600))
	out := tool(t, "bash", script, "from", "to", s.sock)
	if strings.Contains(out, `"error"`) || !strings.Contains(out, "BLOCK_JOB_COMPLETED") {
		t.Fatalf("mirror: %s", out)
	}
	if !bytes.Equal(from.at(0, 20<<20), to.at(0, 20<<20)) {
		t.Error("the mirror differs")
	}
}
