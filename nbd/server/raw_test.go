package server_test

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"syscall"
	"testing"
	"time"

	"github.com/cairnstore/cairn/nbd"
)

// raw is a connection that says what a test wants said. It fails the test
// rather than wait for ever.
func raw(t testing.TB, network, addr string) net.Conn {
	t.Helper()
	nc, err := net.Dial(network, addr)
	must(t, err)
	must(t, nc.SetDeadline(time.Now().Add(60*time.Second)))
	t.Cleanup(func() {
		if err := nc.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
	})
	return nc
}

func mustWrite(t testing.TB, w io.Writer, b []byte) {
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
}

func mustRead(t testing.TB, r io.Reader, b []byte) []byte {
	if _, err := io.ReadFull(r, b); err != nil {
		t.Fatal(err)
	}
	return b
}

// greeted reads the greeting and answers it.
func greeted(t testing.TB, nc net.Conn) net.Conn {
	t.Helper()
	flags, err := nbd.ParseGreeting(mustRead(t, nc, make([]byte, nbd.GreetingSize)))
	must(t, err)
	if flags != nbd.FlagFixedNewstyle|nbd.FlagNoZeroes {
		t.Fatalf("handshake flags %#x", flags)
	}
	mustWrite(t, nc, []byte{0, 0, 0, 3})
	return nc
}

// reply is an answer to an option.
type reply struct {
	kind uint32
	data []byte
}

// ask sends an option and reads the answers up to the final one.
func ask(t testing.TB, nc net.Conn, id uint32, data []byte) []reply {
	t.Helper()
	mustWrite(t, nc, nbd.AppendOption(nil, id, data))
	return answers(t, nc, id)
}

func answers(t testing.TB, nc net.Conn, id uint32) []reply {
	t.Helper()
	var out []reply
	for {
		kind, n, err := nbd.ParseReplyHeader(mustRead(t, nc, make([]byte, nbd.ReplyHeaderSize)), id)
		must(t, err)
		out = append(out, reply{kind, mustRead(t, nc, make([]byte, n))})
		if kind == nbd.RepAck || kind>>31 == 1 {
			return out
		}
	}
}

// wantReply checks the final answer to an option.
func wantReply(t testing.TB, nc net.Conn, id uint32, data []byte, want uint32) {
	t.Helper()
	rs := ask(t, nc, id, data)
	if got := rs[len(rs)-1]; got.kind != want {
		t.Errorf("option %d was answered with %#x (%q), want %#x", id, got.kind, got.data, want)
	}
}

// rawTransmission goes into transmission without structured replies.
func rawTransmission(t testing.TB, network, addr, name string) net.Conn {
	t.Helper()
	nc := greeted(t, raw(t, network, addr))
	wantReply(t, nc, nbd.OptGo, nbd.AppendInfoRequest(nil, name), nbd.RepAck)
	return nc
}

// simple reads a simple reply.
func simple(t testing.TB, nc net.Conn) (errno uint32, cookie uint64) {
	t.Helper()
	b := mustRead(t, nc, make([]byte, nbd.SimpleSize))
	if binary.BigEndian.Uint32(b) != 0x67446698 {
		t.Fatalf("no simple reply: % x", b)
	}
	return binary.BigEndian.Uint32(b[4:]), binary.BigEndian.Uint64(b[8:])
}

// gone checks that the server closes the connection, perhaps after some bytes.
func gone(t testing.TB, nc net.Conn) {
	t.Helper()
	if _, err := io.Copy(io.Discard, nc); isTimeout(err) {
		t.Fatal("the server did not close the connection")
	}
}

func isTimeout(err error) bool {
	ne, ok := err.(net.Error)
	return ok && ne.Timeout()
}

func isReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ENOTCONN)
}
