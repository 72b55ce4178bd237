package server_test

import (
	"bytes"
	"encoding/binary"
	"strings"
	"testing"

	"github.com/cairnstore/cairn/nbd"
	"github.com/cairnstore/cairn/nbd/server"
)

var be = binary.BigEndian

func TestOptionsThatAreRefused(t *testing.T) {
	s := serve(t, server.Config{Exports: exports{"v": newMemory(1 << 20)}})
	nc := greeted(t, raw(t, "unix", s.sock))
	long := strings.Repeat("x", nbd.MaxName+1)
	for _, o := range []struct {
		what string
		id   uint32
		data []byte
		want uint32
	}{
		{"an unknown option", 999, []byte("whatever"), nbd.RepErrUnsup},
		{"peek", 4, nil, nbd.RepErrUnsup},
		{"extended headers", nbd.OptExtendedHdrs, nil, nbd.RepErrUnsup},
		{"TLS without a certificate", nbd.OptStartTLS, nil, nbd.RepErrPolicy},
		{"a list with data", nbd.OptList, []byte{1}, nbd.RepErrInvalid},
		{"structured replies with data", nbd.OptStructured, []byte{1}, nbd.RepErrInvalid},
		{"info without data", nbd.OptInfo, nil, nbd.RepErrInvalid},
		{"info with half a length", nbd.OptInfo, []byte{0, 0}, nbd.RepErrInvalid},
		{"a name longer than its option", nbd.OptGo, []byte{0, 0, 0, 200, 'v', 0, 0}, nbd.RepErrInvalid},
		{"a name of 4 GiB", nbd.OptGo, []byte{255, 255, 255, 255, 'v', 0, 0}, nbd.RepErrInvalid},
		{"a long name", nbd.OptGo, nbd.AppendInfoRequest(nil, long), nbd.RepErrTooBig},
		{"more wanted than said", nbd.OptGo, append(nbd.AppendInfoRequest(nil, "v"), 0, 3), nbd.RepErrInvalid},
		{"more said than there", nbd.OptGo, []byte{0, 0, 0, 1, 'v', 0, 9, 0, 3}, nbd.RepErrInvalid},
		{"an unknown export", nbd.OptGo, nbd.AppendInfoRequest(nil, "w"), nbd.RepErrUnknown},
		{"a forbidden export", nbd.OptInfo, nbd.AppendInfoRequest(nil, "forbidden"), nbd.RepErrPolicy},
		{"a leaving export", nbd.OptInfo, nbd.AppendInfoRequest(nil, "leaving"), nbd.RepErrShutdown},
		{"contexts without structured replies", nbd.OptSetMeta, nbd.AppendMetaRequest(nil, "v", nbd.ContextAllocation), nbd.RepErrInvalid},
		{"contexts without a count", nbd.OptSetMeta, []byte{0, 0, 0, 1, 'v'}, nbd.RepErrInvalid},
		{"too many queries", nbd.OptListMeta, []byte{0, 0, 0, 1, 'v', 255, 255, 255, 255}, nbd.RepErrTooBig},
		{"fewer queries than said", nbd.OptListMeta, []byte{0, 0, 0, 1, 'v', 0, 0, 0, 2, 0, 0, 0, 0}, nbd.RepErrInvalid},
		{"more queries than said", nbd.OptListMeta, []byte{0, 0, 0, 1, 'v', 0, 0, 0, 0, 7}, nbd.RepErrInvalid},
		{"structured replies at last", nbd.OptStructured, nil, nbd.RepAck},
		{"contexts of an unknown export", nbd.OptSetMeta, nbd.AppendMetaRequest(nil, "w", nbd.ContextAllocation), nbd.RepErrUnknown},
		{"the export itself, after all that", nbd.OptGo, nbd.AppendInfoRequest(nil, "v", nbd.InfoName, 77), nbd.RepAck},
	} {
		t.Run(o.what, func(t *testing.T) { wantReply(t, nc, o.id, o.data, o.want) })
	}
	mustWrite(t, nc, nbd.AppendRequest(nil, nbd.Request{Type: nbd.CmdFlush, Cookie: 5}))
	if errno, cookie := simple(t, nc); errno != 0 || cookie != 5 {
		t.Errorf("flush: error %d for %d", errno, cookie)
	}
}

func TestMetadataContexts(t *testing.T) {
	s := serve(t, server.Config{Exports: exports{"v": newMemory(1 << 20), "w": newMemory(1 << 20)}})
	listed := func(nc interface {
		Read([]byte) (int, error)
		Write([]byte) (int, error)
	}, rs []reply) (names []string, id uint32) {
		for _, r := range rs {
			if r.kind == nbd.RepMetaContext {
				i, n, err := nbd.ParseMetaContext(r.data)
				must(t, err)
				names, id = append(names, n), i
			}
		}
		return names, id
	}
	status := func(queries []string, export string) (errno uint32) {
		nc := greeted(t, raw(t, "unix", s.sock))
		wantReply(t, nc, nbd.OptStructured, nil, nbd.RepAck)
		listed(nc, ask(t, nc, nbd.OptSetMeta, nbd.AppendMetaRequest(nil, "v", queries...)))
		wantReply(t, nc, nbd.OptGo, nbd.AppendInfoRequest(nil, export), nbd.RepAck)
		mustWrite(t, nc, nbd.AppendRequest(nil, nbd.Request{Type: nbd.CmdBlockStatus, Len: 4096}))
		head, err := nbd.ParseChunk(mustRead(t, nc, make([]byte, nbd.StructuredSize)))
		must(t, err)
		payload := mustRead(t, nc, make([]byte, head.Len))
		if head.IsError() {
			errno, _, err = nbd.ParseError(payload)
			must(t, err)
		}
		return errno
	}
	nc := greeted(t, raw(t, "unix", s.sock))
	wantReply(t, nc, nbd.OptStructured, nil, nbd.RepAck)
	for _, c := range []struct {
		option  uint32
		queries []string
		want    int
	}{
		{nbd.OptListMeta, nil, 1}, {nbd.OptListMeta, []string{"base:"}, 1}, {nbd.OptListMeta, []string{"qemu:"}, 0},
		{nbd.OptSetMeta, nil, 0}, {nbd.OptSetMeta, []string{"base:"}, 0}, {nbd.OptSetMeta, []string{"x:y", nbd.ContextAllocation}, 1},
	} {
		names, id := listed(nc, ask(t, nc, c.option, nbd.AppendMetaRequest(nil, "v", c.queries...)))
		if len(names) != c.want || (c.want == 1 && (names[0] != nbd.ContextAllocation || (id == 0) != (c.option == nbd.OptListMeta))) {
			t.Errorf("option %d with %q: %q, id %d", c.option, c.queries, names, id)
		}
	}
	if e := status([]string{nbd.ContextAllocation}, "v"); e != 0 {
		t.Errorf("block status after selecting: error %d", e)
	}
	if e := status([]string{nbd.ContextAllocation}, "w"); e != 22 {
		t.Errorf("block status of another export than was selected for: error %d", e)
	}
	if e := status(nil, "v"); e != 22 {
		t.Errorf("block status without selecting: error %d", e)
	}
}

func TestExportName(t *testing.T) {
	s := serve(t, server.Config{Exports: exports{"v": newMemory(1 << 20)}})
	for _, noZeroes := range []bool{true, false} {
		nc := raw(t, "unix", s.sock)
		mustRead(t, nc, make([]byte, nbd.GreetingSize))
		flags, tail := byte(3), 0
		if !noZeroes {
			flags, tail = 1, 124
		}
		mustWrite(t, nc, append([]byte{0, 0, 0, flags}, nbd.AppendOption(nil, nbd.OptExportName, []byte("v"))...))
		b := mustRead(t, nc, make([]byte, nbd.OldExportSize+tail))
		if be.Uint64(b) != 1<<20 || be.Uint16(b[8:])&nbd.SendDF != 0 || !bytes.Equal(b[10:], make([]byte, tail)) {
			t.Errorf("the answer is % x", b)
		}
		mustWrite(t, nc, nbd.AppendRequest(nil, nbd.Request{Type: nbd.CmdRead, Flags: nbd.CmdDF, Len: 8, Cookie: 1}))
		if errno, _ := simple(t, nc); errno != 22 {
			t.Errorf("DF without structured replies: error %d", errno)
		}
		mustWrite(t, nc, nbd.AppendRequest(nil, nbd.Request{Type: nbd.CmdDisc}))
		gone(t, nc)
	}
	for _, name := range []string{"w", strings.Repeat("x", 5000)} {
		nc := greeted(t, raw(t, "unix", s.sock))
		mustWrite(t, nc, nbd.AppendOption(nil, nbd.OptExportName, []byte(name)))
		gone(t, nc)
	}
}

func TestAbort(t *testing.T) {
	s := serve(t, server.Config{Exports: exports{"v": newMemory(1 << 20)}})
	nc := greeted(t, raw(t, "tcp", s.tcp))
	wantReply(t, nc, nbd.OptAbort, []byte("so long"), nbd.RepAck) // what comes with it is ignored
	gone(t, nc)
	hasty := greeted(t, raw(t, "unix", s.sock)) // does not wait for the answer
	mustWrite(t, hasty, nbd.AppendOption(nil, nbd.OptAbort, nil))
	must(t, hasty.Close())
	waitFor(t, "the connection to end", func() bool { return s.All() == 0 })
}

// TestStructuredReplies looks at the bytes: every answer to a read, and every
// failure, is structured once that was agreed.
func TestStructuredReplies(t *testing.T) {
	m := newMemory(1 << 20)
	s := serve(t, server.Config{Exports: exports{"v": m}})
	want := random(5000, 1)
	_, err := m.write(want, 100)
	must(t, err)
	nc := greeted(t, raw(t, "unix", s.sock))
	wantReply(t, nc, nbd.OptStructured, nil, nbd.RepAck)
	wantReply(t, nc, nbd.OptGo, nbd.AppendInfoRequest(nil, "v"), nbd.RepAck)
	mustWrite(t, nc, nbd.AppendRequest(nil, nbd.Request{Type: nbd.CmdRead, Flags: nbd.CmdDF, Off: 100, Len: 5000, Cookie: 9}))
	ch, err := nbd.ParseChunk(mustRead(t, nc, make([]byte, nbd.StructuredSize)))
	must(t, err)
	payload := mustRead(t, nc, make([]byte, ch.Len))
	if !ch.Done || ch.Type != nbd.TypeOffsetData || ch.Cookie != 9 || be.Uint64(payload) != 100 || !bytes.Equal(payload[8:], want) {
		t.Errorf("read: %+v, %d bytes", ch, len(payload))
	}
	for _, req := range []nbd.Request{{Type: nbd.CmdRead, Off: 1 << 20, Len: 1, Cookie: 1}, {Type: nbd.CmdTrim, Off: 1 << 20, Len: 1, Cookie: 2}} {
		mustWrite(t, nc, nbd.AppendRequest(nil, req))
		ch, err := nbd.ParseChunk(mustRead(t, nc, make([]byte, nbd.StructuredSize)))
		must(t, err)
		errno, text, err := nbd.ParseError(mustRead(t, nc, make([]byte, ch.Len)))
		must(t, err)
		if !ch.Done || ch.Type != nbd.TypeError || ch.Cookie != req.Cookie || errno != 22 || text != "invalid" {
			t.Errorf("failure: %+v, %d %q", ch, errno, text)
		}
	}
}
