package client_test

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/cairnstore/cairn/nbd"
	"github.com/cairnstore/cairn/nbd/client"
	"github.com/cairnstore/cairn/proto/status"
)

// liar negotiates properly and answers the first request with given bytes,
// then closes. It returns the URI.
func liar(t *testing.T, structured bool, answer func(r nbd.Request) []byte) string {
	t.Helper()
	return liarOf(t, structured, 1, answer)
}

// liarOf answers some requests, and wants a disconnect then if they are several.
func liarOf(t *testing.T, structured bool, requests int, answer func(r nbd.Request) []byte) string {
	t.Helper()
	sock := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", sock)
	must(t, err)
	done := make(chan error, 1)
	go func() {
		nc, err := l.Accept()
		if err != nil {
			done <- err
			return
		}
		err = lie(nc, structured, requests, answer)
		done <- errors.Join(err, nc.Close())
	}()
	t.Cleanup(func() {
		must(t, l.Close())
		if err := <-done; err != nil {
			t.Errorf("the liar: %v", err)
		}
	})
	return "nbd+unix:///v?socket=" + sock
}

func lie(nc net.Conn, structured bool, requests int, answer func(nbd.Request) []byte) error {
	n := &nbd.Negotiation{Lookup: func(name string) (nbd.Export, error) {
		return nbd.Export{Name: name, Size: 1 << 30, Flags: nbd.HasFlags}, nil
	}}
	if _, err := nc.Write(nbd.AppendGreeting(nil, nbd.FlagFixedNewstyle|nbd.FlagNoZeroes)); err != nil {
		return err
	}
	if _, err := io.ReadFull(nc, make([]byte, nbd.ClientFlagsSize)); err != nil {
		return err
	}
	for next := nbd.NextOption; next != nbd.NextTransmit; {
		head := make([]byte, nbd.OptionHeaderSize)
		if _, err := io.ReadFull(nc, head); err != nil {
			return err
		}
		id, size, err := nbd.ParseOptionHeader(head)
		if err != nil {
			return err
		}
		data := make([]byte, size)
		if _, err := io.ReadFull(nc, data); err != nil {
			return err
		}
		if id == nbd.OptStructured && !structured {
			id = 4711 // as if unknown
		}
		var out []byte
		if out, next = n.Option(id, data, nil); id == 4711 {
			binary.BigEndian.PutUint32(out[8:], nbd.OptStructured)
		}
		if _, err := nc.Write(out); err != nil {
			return err
		}
	}
	head := make([]byte, nbd.RequestSize)
	for range requests {
		if _, err := io.ReadFull(nc, head); err != nil {
			return err
		}
		r, _ := nbd.ParseRequest(head)
		if r.Type == nbd.CmdWrite {
			if _, err := io.ReadFull(nc, make([]byte, r.Len)); err != nil {
				return err
			}
		}
		if _, err := nc.Write(answer(r)); err != nil {
			return err
		}
	}
	if requests == 1 {
		return nil
	}
	_, err := io.ReadFull(nc, head)
	if r, _ := nbd.ParseRequest(head); err == nil && r.Type != nbd.CmdDisc {
		err = status.Errorf(status.Internal, "command %d instead of a disconnect", r.Type)
	}
	return err
}

func chunk(flags, kind uint16, cookie uint64, claimed uint32, payload ...byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, 0x668e33ef)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, kind)
	b = binary.BigEndian.AppendUint64(b, cookie)
	return append(binary.BigEndian.AppendUint32(b, claimed), payload...)
}

// TestLyingServers: every sort of nonsense ends in an error for the request,
// never in a wrong success, a wait without end or a large allocation.
func TestLyingServers(t *testing.T) {
	type answer = func(nbd.Request) []byte
	off := func(r nbd.Request, d uint64) []byte { return binary.BigEndian.AppendUint64(nil, r.Off+d) }
	for what, c := range map[string]struct {
		structured bool
		answer     answer
	}{
		"nothing":                   {false, func(nbd.Request) []byte { return nil }},
		"half a header":             {false, func(r nbd.Request) []byte { return nbd.AppendSimple(nil, r.Cookie, 0)[:9] }},
		"no magic":                  {false, func(nbd.Request) []byte { return make([]byte, 64) }},
		"another cookie":            {false, func(r nbd.Request) []byte { return nbd.AppendSimple(nil, r.Cookie+1, 0) }},
		"half the data":             {false, func(r nbd.Request) []byte { return append(nbd.AppendSimple(nil, r.Cookie, 0), 1, 2, 3) }},
		"structured, not agreed":    {false, func(r nbd.Request) []byte { return chunk(1, nbd.TypeNone, r.Cookie, 0) }},
		"simple, structured agreed": {true, func(r nbd.Request) []byte { return append(nbd.AppendSimple(nil, r.Cookie, 0), make([]byte, 4096)...) }},
		"no data at all":            {true, func(r nbd.Request) []byte { return chunk(1, nbd.TypeNone, r.Cookie, 0) }},
		"a chunk of 4 GiB":          {true, func(r nbd.Request) []byte { return chunk(1, nbd.TypeOffsetData, r.Cookie, 1<<32-1) }},
		"an error of 4 GiB":         {true, func(r nbd.Request) []byte { return chunk(1, nbd.TypeError, r.Cookie, 1<<32-1) }},
		"data before the offset": {true, func(r nbd.Request) []byte {
			return chunk(1, nbd.TypeOffsetData, r.Cookie, 9, append(off(r, ^uint64(0)), 1)...)
		}},
		"data beyond the end": {true, func(r nbd.Request) []byte {
			return chunk(1, nbd.TypeOffsetData, r.Cookie, 10, append(off(r, 4095), 1, 2)...)
		}},
		"data without an offset": {true, func(r nbd.Request) []byte { return chunk(1, nbd.TypeOffsetData, r.Cookie, 3, 1, 2, 3) }},
		"a hole beyond the end": {true, func(r nbd.Request) []byte {
			return chunk(1, nbd.TypeOffsetHole, r.Cookie, 12, append(off(r, 1), 0, 0, 16, 0)...)
		}},
		"an error that is none": {true, func(r nbd.Request) []byte { return chunk(1, nbd.TypeError, r.Cookie, 6, 0, 0, 0, 0, 0, 0) }},
		"an error, cut":         {true, func(r nbd.Request) []byte { return chunk(1, nbd.TypeError, r.Cookie, 6, 0, 0, 0, 5, 0, 9) }},
		"extents for a read":    {true, func(r nbd.Request) []byte { return chunk(1, nbd.TypeBlockStatus, r.Cookie, 5, 0, 0, 0, 1, 0) }},
		"an unknown chunk":      {true, func(r nbd.Request) []byte { return chunk(1, 77, r.Cookie, 1, 0) }},
		"no last chunk":         {true, func(r nbd.Request) []byte { return chunk(0, nbd.TypeOffsetData, r.Cookie, 9, append(off(r, 0), 1)...) }},
		"an error, then the success": {true, func(r nbd.Request) []byte {
			return append(chunk(0, nbd.TypeError, r.Cookie, 6, 0, 0, 0, 5, 0, 0), chunk(1, nbd.TypeNone, r.Cookie, 0)...)
		}},
	} {
		t.Run(what, func(t *testing.T) {
			cl := dial(t, liar(t, c.structured, c.answer))
			if n, err := cl.ReadAt(make([]byte, 4096), 8192); err == nil || n != 0 {
				t.Errorf("read %d bytes, %v", n, err)
			}
		})
	}
}

// TestUnansweredRequests: the kind of the error says whether a change may have
// happened.
func TestUnansweredRequests(t *testing.T) {
	for _, c := range []struct {
		cmd  uint16
		want status.Kind
	}{{nbd.CmdWrite, status.Unknown}, {nbd.CmdFlush, status.Unknown}, {nbd.CmdTrim, status.Unknown}, {nbd.CmdRead, status.Unavailable}} {
		cl := dial(t, liar(t, true, func(nbd.Request) []byte { return nil }))
		start := func() error {
			done := make(chan struct{})
			r := &client.Req{Type: c.cmd, Len: 4096, Done: func(*client.Req) { close(done) }}
			if c.cmd == nbd.CmdWrite || c.cmd == nbd.CmdRead {
				r.Data = make([]byte, 4096)
			}
			cl.Start(r)
			<-done
			return r.Err
		}
		if err := start(); !errors.Is(err, c.want) {
			t.Errorf("command %d in flight: %v, want %v", c.cmd, err, c.want)
		}
		<-cl.Done()
		if err := start(); !errors.Is(err, status.Unavailable) {
			t.Errorf("command %d afterwards: %v", c.cmd, err)
		}
	}
}

func TestSplitReplies(t *testing.T) {
	data := func(r nbd.Request, at uint64, b ...byte) []byte {
		return chunk(0, nbd.TypeOffsetData, r.Cookie, uint32(8+len(b)), append(binary.BigEndian.AppendUint64(nil, r.Off+at), b...)...)
	}
	cl := dial(t, liar(t, true, func(r nbd.Request) []byte {
		b := data(r, 2, 7, 8)
		b = append(b, chunk(0, nbd.TypeOffsetHole, r.Cookie, 12, append(binary.BigEndian.AppendUint64(nil, r.Off+4), 0, 0, 0, 4)...)...)
		b = append(b, data(r, 0, 5, 6)...)
		return append(b, chunk(1, nbd.TypeNone, r.Cookie, 0)...)
	}))
	got := []byte{9, 9, 9, 9, 9, 9, 9, 9}
	if _, err := cl.ReadAt(got, 100); err != nil || string(got) != "\x05\x06\x07\x08\x00\x00\x00\x00" {
		t.Errorf("got % x, %v", got, err)
	}
}

func TestSilentServerIsGivenUp(t *testing.T) {
	sock := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", sock)
	must(t, err)
	defer func() { must(t, l.Close()) }()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Millisecond)
	defer cancel()
	if _, err := client.Dial(ctx, "nbd+unix:///?socket="+sock, nil); !errors.Is(err, status.Timeout) {
		t.Errorf("dial: %v", err)
	}
	if _, err := client.Dial(context.Background(), "nbd+unix:///?socket="+sock+"x", nil); !errors.Is(err, status.Unavailable) {
		t.Errorf("dial without a server: %v", err)
	}
}

func TestParseURI(t *testing.T) {
	for uri, want := range map[string]client.URI{
		"nbd://h":                      {Network: "tcp", Addr: "h:10809", Host: "h"},
		"nbd://h:1/a%20b/c":            {Network: "tcp", Addr: "h:1", Export: "a b/c", Host: "h"},
		"nbds://[::1]:7/x":             {Network: "tcp", Addr: "[::1]:7", Export: "x", TLS: true, Host: "::1"},
		"nbd:///x":                     {Network: "tcp", Addr: "localhost:10809", Export: "x", Host: "localhost"},
		"nbd+unix:///v?socket=/run/s":  {Network: "unix", Addr: "/run/s", Export: "v"},
		"nbds+unix:///?socket=/run/s":  {Network: "unix", Addr: "/run/s", TLS: true},
		"nbd+unix:////v?socket=/run/s": {Network: "unix", Addr: "/run/s", Export: "/v"},
	} {
		if got, err := client.ParseURI(uri); err != nil || got != want {
			t.Errorf("%s: %+v, %v", uri, got, err)
		}
	}
	for _, uri := range []string{"", "http://h", "nbd+unix:///v", "nbd+unix://h/v?socket=/s", "nbd://h:x/", "nbd+ssh://h/v", "v"} {
		if got, err := client.ParseURI(uri); !errors.Is(err, status.Invalid) {
			t.Errorf("%q: %+v, %v", uri, got, err)
		}
	}
}

// TestServerShutsDown: after "shutting down" the client sends nothing more, and
// says goodbye when all is answered.
func TestServerShutsDown(t *testing.T) {
	var first nbd.Request
	cl := dial(t, liarOf(t, true, 2, func(r nbd.Request) []byte {
		switch r.Type {
		case nbd.CmdRead: // waits for the write's answer
			first = r
			return []byte{}
		case nbd.CmdWrite:
			return append(nbd.AppendError(nil, r.Cookie, 108, "going"), nbd.AppendError(nil, first.Cookie, 108, "going")...)
		}
		return nil
	}))
	done := make(chan *client.Req, 2)
	cl.Start(&client.Req{Type: nbd.CmdRead, Data: make([]byte, 512), Done: func(r *client.Req) { done <- r }})
	cl.Start(&client.Req{Type: nbd.CmdWrite, Data: make([]byte, 512), Done: func(r *client.Req) { done <- r }})
	for range 2 {
		if r := <-done; !errors.Is(r.Err, status.Shutdown) {
			t.Errorf("command %d: %v", r.Type, r.Err)
		}
	}
	<-cl.Done() // the server hangs up at the disconnect
	if _, err := cl.WriteAt([]byte{1}, 0); !errors.Is(err, status.Unavailable) {
		t.Errorf("afterwards: %v", err)
	}
}

// TestUnknownErrorsAreInvalid: an error number the protocol does not know is
// EINVAL's, and the connection goes on.
func TestUnknownErrorsAreInvalid(t *testing.T) {
	cl := dial(t, liarOf(t, true, 2, func(r nbd.Request) []byte {
		if r.Off == 0 {
			return nbd.AppendError(nil, r.Cookie, 4711, "")
		}
		return chunk(1, nbd.TypeOffsetData, r.Cookie, 12, append(binary.BigEndian.AppendUint64(nil, r.Off), 1, 2, 3, 4)...)
	}))
	b := make([]byte, 4)
	if _, err := cl.ReadAt(b, 0); !errors.Is(err, status.Invalid) {
		t.Errorf("error 4711: %v", err)
	}
	if _, err := cl.ReadAt(b, 512); err != nil || b[3] != 4 {
		t.Errorf("the next read: %v", err)
	}
}
