package server_test

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"testing"

	"github.com/cairnstore/cairn/nbd"
	"github.com/cairnstore/cairn/nbd/client"
	"github.com/cairnstore/cairn/nbd/server"
	"github.com/cairnstore/cairn/proto/status"
)

// Rules of the protocol document that no other test is about.
// docs/NBD-SUPPORT.md says which rule is held where.

// TestZeroLengthRequests: the document leaves the answer open, but the
// connection has to stay.
func TestZeroLengthRequests(t *testing.T) {
	s := serve(t, server.Config{Exports: exports{"v": newMemory(1 << 20)}})
	for _, structured := range []bool{false, true} {
		nc := greeted(t, raw(t, "unix", s.sock))
		if structured {
			wantReply(t, nc, nbd.OptStructured, nil, nbd.RepAck)
		}
		wantReply(t, nc, nbd.OptGo, nbd.AppendInfoRequest(nil, "v"), nbd.RepAck)
		for i, cmd := range []uint16{nbd.CmdRead, nbd.CmdWrite, nbd.CmdTrim, nbd.CmdCache, nbd.CmdWriteZeroes, nbd.CmdBlockStatus} {
			mustWrite(t, nc, nbd.AppendRequest(nil, nbd.Request{Type: cmd, Off: 4096, Cookie: uint64(i)}))
			if errno, cookie := anyReply(t, nc); errno != 22 || cookie != uint64(i) {
				t.Errorf("command %d of no length, structured %v: error %d for %d", cmd, structured, errno, cookie)
			}
		}
		mustWrite(t, nc, nbd.AppendRequest(nil, nbd.Request{Type: nbd.CmdFlush, Cookie: 99}))
		if errno, cookie := anyReply(t, nc); errno != 0 || cookie != 99 {
			t.Errorf("afterwards: error %d for %d", errno, cookie)
		}
	}
}

// anyReply reads a simple reply, or one structured chunk.
func anyReply(t *testing.T, nc io.Reader) (errno uint32, cookie uint64) {
	t.Helper()
	head := mustRead(t, nc, make([]byte, 4))
	n, err := nbd.ReplyHead(head)
	must(t, err)
	ch, err := nbd.ParseChunk(append(head, mustRead(t, nc, make([]byte, n-4))...))
	must(t, err)
	if !ch.Structured {
		return ch.Errno, ch.Cookie
	}
	payload := mustRead(t, nc, make([]byte, ch.Len))
	if ch.IsError() {
		errno, _, err = nbd.ParseError(payload)
		must(t, err)
	}
	return errno, ch.Cookie
}

// TestInfoAndGoAgree: the same information comes from both, once each, without
// padding after the final reply, whatever the client said of zeroes.
func TestInfoAndGoAgree(t *testing.T) {
	s := serve(t, server.Config{Exports: exports{"v": newMemory(1 << 20)}})
	nc := raw(t, "unix", s.sock)
	mustRead(t, nc, make([]byte, nbd.GreetingSize))
	mustWrite(t, nc, []byte{0, 0, 0, 1}) // zeroes wanted
	data := nbd.AppendInfoRequest(nil, "v", nbd.InfoName, nbd.InfoBlockSize, 4711)
	info, open := ask(t, nc, nbd.OptInfo, data), ask(t, nc, nbd.OptGo, data)
	if len(info) != len(open) {
		t.Fatalf("%d replies and %d", len(info), len(open))
	}
	seen := map[uint16]int{}
	for i := range info {
		if info[i].kind != open[i].kind || !bytes.Equal(info[i].data, open[i].data) {
			t.Errorf("reply %d: %+v and %+v", i, info[i], open[i])
		}
		if info[i].kind == nbd.RepInfo {
			seen[be.Uint16(info[i].data)]++
		}
	}
	if seen[nbd.InfoExport] != 1 || seen[nbd.InfoName] != 1 || seen[nbd.InfoBlockSize] != 1 || len(seen) != 3 {
		t.Errorf("information %v", seen)
	}
	for _, r := range info {
		if r.kind == nbd.RepInfo && be.Uint16(r.data) == nbd.InfoBlockSize && (len(r.data) != 14 || be.Uint32(r.data[2:]) != 1 || be.Uint32(r.data[6:]) != 4096 || be.Uint32(r.data[10:]) != 32<<20) {
			t.Errorf("size constraints % x", r.data)
		}
	}
	mustWrite(t, nc, nbd.AppendRequest(nil, nbd.Request{Type: nbd.CmdFlush, Cookie: 7}))
	if errno, cookie := simple(t, nc); errno != 0 || cookie != 7 {
		t.Errorf("right after the final reply: error %d for %d", errno, cookie)
	}
}

// TestDisconnectAnswersFirst: what came before a disconnect is done and
// answered; what follows it is not looked at; then the connection ends.
func TestDisconnectAnswersFirst(t *testing.T) {
	m := newMemory(1 << 20)
	s := serve(t, server.Config{Exports: exports{"v": m}})
	nc := rawTransmission(t, "unix", s.sock, "v")
	m.hold()
	b := append(write4k(1, 0), write4k(2, 1)...)
	b = nbd.AppendRequest(b, nbd.Request{Type: nbd.CmdDisc})
	b = append(b, write4k(3, 2)...)
	mustWrite(t, nc, b)
	waitFor(t, "both to arrive", func() bool { return m.kept() == 2 })
	m.letGo()
	for range 2 {
		if errno, cookie := simple(t, nc); errno != 0 || cookie > 2 {
			t.Errorf("error %d for %d", errno, cookie)
		}
	}
	gone(t, nc)
	if got := m.at(8192, 1); got[0] != 0 {
		t.Error("a write after the disconnect has been done")
	}
}

// TestTLSEndsWithGoodbye: the TLS session is shut down before the connection.
func TestTLSEndsWithGoodbye(t *testing.T) {
	a := newAuthority(t)
	s := serve(t, server.Config{Exports: exports{"v": newMemory(1 << 20)}, TLS: a.serverConfig(t)})
	nc := greeted(t, raw(t, "tcp", s.tcp))
	wantReply(t, nc, nbd.OptStartTLS, nil, nbd.RepAck)
	conf := a.clientConfig(t)
	conf.ServerName = "localhost"
	tc := tls.Client(nc, conf)
	wantReply(t, tc, nbd.OptGo, nbd.AppendInfoRequest(nil, "v"), nbd.RepAck)
	mustWrite(t, tc, nbd.AppendRequest(nil, nbd.Request{Type: nbd.CmdDisc}))
	if _, err := tc.Read(make([]byte, 1)); err != io.EOF { // a bare end would be ErrUnexpectedEOF
		t.Errorf("the session ended with %v", err)
	}
}

// TestOldClientGetsNoTLS: a client without fixed newstyle is served plainly, or
// not at all.
func TestOldClientGetsNoTLS(t *testing.T) {
	a := newAuthority(t)
	s := serve(t, server.Config{Exports: exports{"v": newMemory(1 << 20)}, TLS: a.serverConfig(t)})
	nc := raw(t, "unix", s.sock)
	mustRead(t, nc, make([]byte, nbd.GreetingSize))
	mustWrite(t, nc, []byte{0, 0, 0, 2})
	wantReply(t, nc, nbd.OptStartTLS, nil, nbd.RepErrPolicy)
	mustWrite(t, nc, nbd.AppendOption(nil, nbd.OptExportName, []byte("v")))
	if b := mustRead(t, nc, make([]byte, nbd.OldExportSize)); be.Uint64(b) != 1<<20 {
		t.Errorf("export % x", b)
	}
	n := nbd.Negotiation{TLS: nbd.TLSRequired}
	if err := n.ClientFlags([]byte{0, 0, 0, 2}); !errors.Is(err, status.Permission) {
		t.Errorf("where TLS is demanded: %v", err)
	}
}

// TestFlagsOfCommands: FUA is fine with every command, each other flag only
// where it is documented.
func TestFlagsOfCommands(t *testing.T) {
	s := serve(t, server.Config{Exports: exports{"v": newMemory(1 << 20)}})
	c := dial(t, s.uri("v"), nil)
	allowed := map[uint16]uint16{nbd.CmdRead: nbd.CmdDF, nbd.CmdWriteZeroes: nbd.CmdNoHole | nbd.CmdFastZero, nbd.CmdBlockStatus: nbd.CmdReqOne}
	for _, cmd := range []uint16{nbd.CmdRead, nbd.CmdWrite, nbd.CmdFlush, nbd.CmdTrim, nbd.CmdCache, nbd.CmdWriteZeroes, nbd.CmdBlockStatus} {
		for bit := range 16 {
			flag := uint16(1) << bit
			r := client.Req{Type: cmd, Flags: flag, Len: 4096}
			if cmd == nbd.CmdRead || cmd == nbd.CmdWrite {
				r.Data = make([]byte, 4096)
			}
			want := status.Invalid
			if flag == nbd.CmdFUA || allowed[cmd]&flag != 0 {
				want = status.OK
			}
			if got := status.Of(do(c, &r)); got != want {
				t.Errorf("command %d with flag %#x: %v, want %v", cmd, flag, got, want)
			}
		}
	}
}

// TestOneChunkPerRead: a read is answered by a single content chunk, of exactly
// what was asked, the last of its reply; so DF is always kept.
func TestOneChunkPerRead(t *testing.T) {
	m := newMemory(4 << 20)
	s := serve(t, server.Config{Exports: exports{"v": m}})
	_, err := m.write(random(100, 5), 1<<20) // data amid holes
	must(t, err)
	nc := greeted(t, raw(t, "unix", s.sock))
	wantReply(t, nc, nbd.OptStructured, nil, nbd.RepAck)
	wantReply(t, nc, nbd.OptGo, nbd.AppendInfoRequest(nil, "v"), nbd.RepAck)
	for _, flags := range []uint16{0, nbd.CmdDF} {
		mustWrite(t, nc, nbd.AppendRequest(nil, nbd.Request{Type: nbd.CmdRead, Flags: flags, Off: 1, Len: 2 << 20, Cookie: 1 << 63}))
		ch, err := nbd.ParseChunk(mustRead(t, nc, make([]byte, nbd.StructuredSize)))
		must(t, err)
		payload := mustRead(t, nc, make([]byte, ch.Len))
		if !ch.Done || ch.Type != nbd.TypeOffsetData || ch.Cookie != 1<<63 || nbd.ParseOffset(payload) != 1 || !bytes.Equal(payload[8:], m.at(1, 2<<20)) {
			t.Errorf("flags %#x: %+v", flags, ch)
		}
	}
}

// TestBlockStatusRules: one chunk, extents from the offset on, none empty, their
// sum no longer than what was asked, neighbours of different states.
func TestBlockStatusRules(t *testing.T) {
	m := newMemory(1 << 20)
	s := serve(t, server.Config{Exports: exports{"v": m}})
	for i := 0; i < 16; i += 2 {
		_, err := m.write([]byte{1}, i*memoryThin)
		must(t, err)
	}
	c := dial(t, s.uri("v"), nil)
	for _, r := range []*client.Req{{Off: 0, Len: 1 << 20}, {Off: 12345, Len: 500000}, {Off: 1<<20 - 1, Len: 1}, {Off: 70000, Len: 300000, Flags: nbd.CmdReqOne}} {
		r.Type = nbd.CmdBlockStatus
		must(t, do(c, r))
		sum, last := uint64(0), uint32(99)
		for _, x := range r.Extents {
			if x.Len == 0 || x.State == last || x.State&^(nbd.StateHole|nbd.StateZero) != 0 {
				t.Errorf("[%d, +%d): %v", r.Off, r.Len, r.Extents)
			}
			sum, last = sum+uint64(x.Len), x.State
		}
		if sum > uint64(r.Len) || (r.Flags == 0 && sum != uint64(r.Len)) || (r.Flags != 0 && len(r.Extents) != 1) {
			t.Errorf("[%d, +%d) flags %#x: %v", r.Off, r.Len, r.Flags, r.Extents)
		}
	}
}

// TestFlushCoversEveryConnection: that is what CAN_MULTI_CONN promises, here
// that the volume is one, however many connections it has.
func TestFlushCoversEveryConnection(t *testing.T) {
	m := newMemory(1 << 20)
	s := serve(t, server.Config{Exports: exports{"v": m}})
	a, b := dial(t, s.uri("v"), nil), dial(t, s.tcpURI("v"), nil)
	if a.Info().Flags&nbd.CanMultiConn == 0 {
		t.Error("several connections are not allowed")
	}
	m.mu.Lock()
	m.record = true
	m.mu.Unlock()
	_, err := a.WriteAt([]byte("seen"), 10)
	must(t, err)
	must(t, b.Flush())
	got := make([]byte, 4)
	_, err = b.ReadAt(got, 10)
	must(t, err)
	m.mu.Lock()
	defer m.mu.Unlock()
	if string(got) != "seen" || len(m.ops) != 3 {
		t.Errorf("read %q after %+v", got, m.ops)
	}
}

// TestCacheChangesNothing but time; a failing hint is no failing disk.
func TestCacheChangesNothing(t *testing.T) {
	m := newMemory(1 << 20)
	s := serve(t, server.Config{Exports: exports{"v": m}})
	c := dial(t, s.uri("v"), nil)
	want := random(8192, 3)
	_, err := c.WriteAt(want, 0)
	must(t, err)
	must(t, c.Cache(0, 1<<20))
	wantKind(t, do(c, &client.Req{Type: nbd.CmdCache, Off: 1 << 20, Len: 4096}), status.Invalid)
	got := make([]byte, len(want))
	_, err = c.ReadAt(got, 0)
	must(t, err)
	if !bytes.Equal(got, want) || !m.Extents(512<<10, 1)[0].Hole {
		t.Error("a cache hint has changed the volume")
	}
}
