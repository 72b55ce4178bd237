package server_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pojntfx/go-nbd/pkg/protocol"

	"github.com/cairnstore/cairn/nbd/server"
)

// TestNBDInfoModes is every mode nbdinfo has beyond those of TestNBDInfo.
func TestNBDInfoModes(t *testing.T) {
	m, ro := newMemory(1<<20), newMemory(1<<20)
	ro.readOnly = true
	s := serve(t, server.Config{Exports: exports{"v": m, "ro": ro, "": m}})
	_, err := m.write([]byte{1}, 512<<10)
	must(t, err)
	var info struct {
		Protocol string
		Exports  []struct {
			Name         string `json:"export-name"`
			Size         uint64 `json:"export-size"`
			ReadOnly     bool   `json:"is_read_only"`
			CanMultiConn bool   `json:"can_multi_conn"`
			Contexts     []string
		}
	}
	must(t, json.Unmarshal([]byte(tool(t, "nbdinfo", "--json", s.uri("v"))), &info))
	if len(info.Exports) != 1 || info.Protocol != "newstyle-fixed" || info.Exports[0].Size != 1<<20 || !info.Exports[0].CanMultiConn || len(info.Exports[0].Contexts) != 1 {
		t.Errorf("--json: %+v", info)
	}
	must(t, json.Unmarshal([]byte(tool(t, "nbdinfo", "--list", "--json", s.uri(""))), &info))
	if len(info.Exports) != 3 {
		t.Errorf("--list --json: %+v", info)
	}
	for _, x := range info.Exports {
		if x.ReadOnly != (x.Name == "ro") {
			t.Errorf("--list --json: %+v", x)
		}
	}
	wantText(t, tool(t, "nbdinfo", "--map", s.uri("v")), `(?m)^ +524288 +65536 +0 +data$`, `(?m)^ +0 +524288 +3 +hole,zero$`)
	wantText(t, tool(t, "nbdinfo", "--map", "--totals", s.uri("v")), `65536 +6\.\d% +0 data`, `983040 +93\.\d% +3 hole,zero`)
	wantText(t, tool(t, "nbdinfo", "--size", "--json", s.uri("v")), `"size": ?1048576|"export-size": ?1048576|1048576`)
	for _, c := range []struct {
		args []string
		yes  bool
	}{
		{[]string{"--is", "read-only", s.uri("v")}, false}, {[]string{"--is", "read-only", s.uri("ro")}, true},
		{[]string{"--is", "rotational", s.uri("v")}, false}, {[]string{"--is", "tls", s.uri("v")}, false},
		{[]string{"--can", "connect", s.uri("v")}, true}, {[]string{"--can", "connect", s.uri("nothing")}, false},
		{[]string{"--can", "read", s.uri("ro")}, true}, {[]string{"--can", "write", s.uri("ro")}, false},
	} {
		if _, stderr, err := attempt(t, "nbdinfo", c.args...); (err == nil) != c.yes {
			t.Errorf("nbdinfo %v: %v %s", c.args, err, stderr)
		}
	}
}

// TestNBDShell is a script for libnbd's shell: options one at a time, structured
// reads, block status, flags, and requests a careful client would not send.
func TestNBDShell(t *testing.T) {
	ro := newMemory(1 << 20)
	ro.readOnly = true
	s := serve(t, server.Config{Exports: exports{"v": newMemory(1 << 20), "ro": ro}})
	script := filepath.Join(t.TempDir(), "script.py")
	must(t, os.WriteFile(script, []byte(`
import errno
sock = SOCK
def fails(what, number, f):
    try:
        f()
    except nbd.Error as e:
        assert e.errnum == number, (what, e.errno, e.string)
        return
    raise AssertionError(what + " did not fail")

# Options, one at a time.
h.set_opt_mode(True)
h.set_export_name("v")
h.add_meta_context("base:allocation")
h.connect_unix(sock)
seen = []
h.opt_list(lambda name, desc: seen.append(name) or 0)
assert sorted(seen) == ["ro", "v"], seen
ctx = []
h.opt_list_meta_context(lambda name: ctx.append(name) or 0)
assert ctx == ["base:allocation"], ctx
h.opt_info()
assert h.get_size() == 1 << 20
assert h.get_block_size(nbd.SIZE_MAXIMUM) == 32 << 20
h.set_export_name("none")
fails("info of nothing", errno.ENOENT, h.opt_info)
h.set_export_name("v")
h.opt_go()
assert h.get_structured_replies_negotiated()

# Data there and back, in chunks.
data = bytes(range(256)) * 256
h.pwrite(data, 100, nbd.CMD_FLAG_FUA)
assert h.pread(len(data), 100) == data
chunks = []
def chunk(buf, off, status, err):
    chunks.append((off, len(buf), status))
    return 0
got = h.pread_structured(len(data), 100, chunk, nbd.CMD_FLAG_DF)
assert got == data and len(chunks) == 1 and chunks[0][:2] == (100, len(data)), chunks

# Allocation.
spans = []
def extents(name, off, entries, err):
    assert name == "base:allocation"
    spans.extend(zip(entries[::2], entries[1::2]))
    return 0
h.block_status(1 << 20, 0, extents)
assert sum(n for n, _ in spans) == 1 << 20 and spans[0][1] == 0 and spans[-1][1] == 3, spans
del spans[:]
h.block_status(1 << 20, 0, extents, nbd.CMD_FLAG_REQ_ONE)
assert len(spans) == 1, spans

# Zeroes, holes, hints.
h.zero(65536, 65536, nbd.CMD_FLAG_NO_HOLE)
h.zero(65536, 131072, nbd.CMD_FLAG_FAST_ZERO)
fails("a fast provisioning", errno.ENOTSUP, lambda: h.zero(4096, 0, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO))
assert h.pread(131072, 65536) == bytes(131072)
h.trim(65536, 0, nbd.CMD_FLAG_FUA)
h.cache(1 << 20, 0)
h.flush()

# Many in flight, out of order.
done = []
bufs = [nbd.Buffer.from_bytearray(bytearray([i]) * 512) for i in range(64)]
cookies = [h.aio_pwrite(b, i * 4096, completion=lambda e, i=i: done.append(i) or 1) for i, b in enumerate(bufs)]
while len(done) < 64:
    h.poll(-1)
for i in range(64):
    assert h.pread(512, i * 4096) == bytes([i]) * 512

# What libnbd would not send by itself.
h.set_strict_mode(0)
fails("a read beyond the end", errno.EINVAL, lambda: h.pread(512, 1 << 20))
fails("a write beyond the end", errno.ENOSPC, lambda: h.pwrite(b"x" * 512, 1 << 20))
fails("zeroes beyond the end", errno.ENOSPC, lambda: h.zero(512, 1 << 20))
fails("a trim beyond the end", errno.EINVAL, lambda: h.trim(512, 1 << 20))
fails("an unknown flag", errno.EINVAL, lambda: h.trim(512, 0, 1 << 9))
fails("nothing to read", errno.EINVAL, lambda: h.trim(0, 0))
assert h.pread(512, 4096) == bytes([1]) * 512
h.shutdown()

# A read-only export, and one opened without structured replies.
r = nbd.NBD()
r.set_export_name("ro")
r.set_request_structured_replies(False)
r.connect_unix(sock)
assert r.is_read_only() and not r.get_structured_replies_negotiated() and not r.can_df()
r.set_strict_mode(0)
fails("a write to what is read only", errno.EPERM, lambda: r.pwrite(b"x" * 512, 0))
fails("a trim of what is read only", errno.EPERM, lambda: r.trim(512, 0))
assert r.pread(512, 0) == bytes(512)
r.shutdown()
print("done")
`), 0o600))
	// The system's Python has the module, whatever other one there is.
	out := tool(t, "env", "PATH=/usr/bin:/bin", "nbdsh", "-c", "SOCK='"+s.sock+"'", "-c", "exec(open('"+script+"').read())")
	if strings.TrimSpace(out) != "done" {
		t.Errorf("nbdsh: %s", out)
	}
}

// TestFioMatrix verifies content at each depth with small, large and odd blocks.
func TestFioMatrix(t *testing.T) {
	s := serve(t, server.Config{Exports: exports{"v": newMemory(16 << 20)}})
	for _, depth := range []int{1, 32, 128} {
		for _, bs := range []string{"512", "4k", "36k", "1m"} {
			report := filepath.Join(t.TempDir(), "report")
			tool(t, "fio", "--name=t", "--ioengine=nbd", "--uri="+s.uri("v"), "--rw=randwrite", "--size=16m", "--io_size=3m", "--bs="+bs, fmt.Sprintf("--iodepth=%d", depth),
				"--verify=crc32c", "--verify_fatal=1", "--randseed=5", "--output-format=json", "--output="+report)
			text, err := os.ReadFile(report)
			must(t, err)
			var res struct{ Jobs []struct{ Error int } }
			must(t, json.Unmarshal(text[bytes.IndexByte(text, '{'):], &res))
			if len(res.Jobs) != 1 || res.Jobs[0].Error != 0 {
				t.Errorf("fio at depth %d with %s: %+v", depth, bs, res)
			}
		}
	}
}

// TestUnprivilegedQEMU: the socket's mode decides whether a process of another
// user gets in.
func TestUnprivilegedQEMU(t *testing.T) {
	dir, err := os.MkdirTemp("", "sock")
	must(t, err)
	t.Cleanup(func() { must(t, os.RemoveAll(dir)) })
	must(t, os.Chmod(dir, 0o755))
	for mode, allowed := range map[os.FileMode]bool{0o666: true, 0o660: false, 0o600: false} {
		path := filepath.Join(dir, fmt.Sprintf("%o", mode))
		l, err := server.ListenUnix(server.Socket{Path: path, Mode: mode})
		must(t, err)
		s := server.New(server.Config{Exports: exports{"v": newMemory(1 << 20)}})
		served := make(chan error, 1)
		go func() { served <- s.Serve(l) }()
		_, stderr, err := attempt(t, "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "qemu-img", "info", "nbd+unix:///v?socket="+path)
		if (err == nil) != allowed || (err != nil && !strings.Contains(stderr, "Permission denied")) {
			t.Errorf("mode %o: %v %s", mode, err, stderr)
		}
		must(t, s.Close(t.Context()))
		wantKindOf(t, <-served)
	}
}

func wantKindOf(t *testing.T, err error) {
	t.Helper()
	if !errors.Is(err, server.ErrClosed) {
		t.Errorf("Serve ended with %v", err)
	}
}

// TestGoNBDTypes speaks to the server with go-nbd's own structures, as its
// client would if it formed GO rightly.
func TestGoNBDTypes(t *testing.T) {
	s := serve(t, server.Config{Exports: exports{"v": newMemory(1 << 20)}})
	nc := raw(t, "unix", s.sock)
	read := func(v any) {
		t.Helper()
		must(t, binary.Read(nc, binary.BigEndian, v))
	}
	write := func(v any) { t.Helper(); must(t, binary.Write(nc, binary.BigEndian, v)) }
	var hello protocol.NegotiationNewstyleHeader
	read(&hello)
	if hello.OldstyleMagic != protocol.NEGOTIATION_MAGIC_OLDSTYLE || hello.OptionMagic != protocol.NEGOTIATION_MAGIC_OPTION ||
		hello.HandshakeFlags&protocol.NEGOTIATION_HANDSHAKE_FLAG_FIXED_NEWSTYLE == 0 {
		t.Fatalf("%+v", hello)
	}
	write(uint32(protocol.NEGOTIATION_HANDSHAKE_FLAG_FIXED_NEWSTYLE))
	option := func(id uint32, data []byte) {
		write(protocol.NegotiationOptionHeader{OptionMagic: protocol.NEGOTIATION_MAGIC_OPTION, ID: id, Length: uint32(len(data))})
		mustWrite(t, nc, data)
	}
	var rep protocol.NegotiationReplyHeader
	option(protocol.NEGOTIATION_ID_OPTION_LIST, nil)
	for read(&rep); rep.Type == protocol.NEGOTIATION_TYPE_REPLY_SERVER; read(&rep) {
		if b := mustRead(t, nc, make([]byte, rep.Length)); string(b[4:]) != "v" {
			t.Errorf("listed %q", b)
		}
	}
	option(protocol.NEGOTIATION_ID_OPTION_GO, []byte{0, 0, 0, 1, 'v', 0, 0})
	var info protocol.NegotiationReplyInfo
	for read(&rep); rep.Type == protocol.NEGOTIATION_TYPE_REPLY_INFO; read(&rep) {
		b := mustRead(t, nc, make([]byte, rep.Length))
		if binary.BigEndian.Uint16(b) == protocol.NEGOTIATION_TYPE_INFO_EXPORT {
			must(t, binary.Read(bytes.NewReader(b), binary.BigEndian, &info))
		}
	}
	if rep.Type != protocol.NEGOTIATION_TYPE_REPLY_ACK || info.Size != 1<<20 || info.TransmissionFlags&protocol.NEGOTIATION_REPLY_FLAGS_CAN_MULTI_CONN == 0 {
		t.Fatalf("%+v %+v", rep, info)
	}
	want := random(4096, 8)
	var reply protocol.TransmissionReplyHeader
	write(protocol.TransmissionRequestHeader{RequestMagic: protocol.TRANSMISSION_MAGIC_REQUEST, Type: protocol.TRANSMISSION_TYPE_REQUEST_WRITE, Handle: 5, Offset: 12288, Length: 4096})
	mustWrite(t, nc, want)
	read(&reply)
	if reply != (protocol.TransmissionReplyHeader{ReplyMagic: protocol.TRANSMISSION_MAGIC_REPLY, Handle: 5}) {
		t.Errorf("write: %+v", reply)
	}
	write(protocol.TransmissionRequestHeader{RequestMagic: protocol.TRANSMISSION_MAGIC_REQUEST, Type: protocol.TRANSMISSION_TYPE_REQUEST_READ, Handle: 6, Offset: 12288, Length: 4096})
	read(&reply)
	if got := mustRead(t, nc, make([]byte, 4096)); reply.Error != 0 || reply.Handle != 6 || !bytes.Equal(got, want) {
		t.Errorf("read: %+v", reply)
	}
	write(protocol.TransmissionRequestHeader{RequestMagic: protocol.TRANSMISSION_MAGIC_REQUEST, Type: protocol.TRANSMISSION_TYPE_REQUEST_READ, Handle: 7, Offset: 1 << 20, Length: 1})
	if read(&reply); reply.Error != protocol.TRANSMISSION_ERROR_EINVAL {
		t.Errorf("beyond the end: %+v", reply)
	}
	write(protocol.TransmissionRequestHeader{RequestMagic: protocol.TRANSMISSION_MAGIC_REQUEST, Type: protocol.TRANSMISSION_TYPE_REQUEST_DISC})
	if _, err := nc.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("after the disconnect: %v", err)
	}
}
