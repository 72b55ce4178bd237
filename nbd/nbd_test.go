package nbd

import (
	"bytes"
	"testing"

	"github.com/cairnstore/cairn/proto/status"
)

func testNegotiation() *Negotiation {
	return &Negotiation{
		List: func() []string { return []string{"v", "w"} },
		Lookup: func(name string) (Export, error) {
			if name != "v" && name != "w" {
				return Export{}, status.Errorf(status.NotFound, "no %q", name)
			}
			return Export{Name: name, Size: 1 << 20, Flags: HasFlags}, nil
		},
	}
}

// FuzzNegotiation feeds a stream of options to the server's side. Whatever
// comes, answers are well formed and fit the option, and transmission begins
// only with an export that exists.
func FuzzNegotiation(f *testing.F) {
	f.Add(uint8(0), AppendOption(AppendOption(nil, OptStructured, nil), OptGo, AppendInfoRequest(nil, "v", 1, 3)))
	f.Add(uint8(1), AppendOption(nil, OptSetMeta, AppendMetaRequest(nil, "v", ContextAllocation)))
	f.Add(uint8(2), AppendOption(AppendOption(nil, OptStartTLS, nil), OptExportName, []byte("v")))
	f.Add(uint8(1), AppendOption(AppendOption(nil, OptList, nil), OptAbort, nil))
	f.Fuzz(func(t *testing.T, tls uint8, b []byte) {
		n := testNegotiation()
		n.TLS = TLSRule(tls % 4)
		for len(b) >= OptionHeaderSize {
			id, length, err := ParseOptionHeader(b)
			if err != nil || int(length) > len(b)-OptionHeaderSize {
				return
			}
			data := b[OptionHeaderSize : OptionHeaderSize+length]
			b = b[OptionHeaderSize+length:]
			required := n.TLS == TLSRequired
			out, next := n.Option(id, data, nil)
			if id != OptExportName {
				checkReplies(t, id, out)
			}
			switch next {
			case NextTransmit:
				if required || (n.Chosen.Name != "v" && n.Chosen.Name != "w") || (n.AllocID != 0 && !n.Structured) {
					t.Fatalf("transmission of %+v, TLS required: %v", n.Chosen, required)
				}
				return
			case NextTLS:
				if n = n.Secured(); n.Structured || n.TLS != TLSActive {
					t.Fatal("state survives TLS")
				}
			case NextClose:
				return
			}
		}
	})
}

// checkReplies wants one or more whole replies, the last of them final.
func checkReplies(t *testing.T, id uint32, b []byte) {
	t.Helper()
	final := false
	for len(b) > 0 {
		if final {
			t.Fatal("a reply follows the final one")
		}
		kind, n, err := ParseReplyHeader(b, id)
		if err != nil || int(n) > len(b)-ReplyHeaderSize {
			t.Fatalf("option %d: malformed reply: %v", id, err)
		}
		final = kind == RepAck || kind&repError != 0
		b = b[ReplyHeaderSize+n:]
	}
	if !final {
		t.Fatalf("option %d has no final reply", id)
	}
}

// FuzzRequest: what the door lets through is inside the export and the limits.
func FuzzRequest(f *testing.F) {
	f.Add(AppendRequest(nil, Request{Type: CmdRead, Off: 1<<64 - 1, Len: 2}), uint64(1<<20), uint8(0))
	f.Add(AppendRequest(nil, Request{Type: CmdWrite, Len: 1<<32 - 1}), uint64(1<<40), uint8(2))
	f.Add(AppendRequest(nil, Request{Type: CmdBlockStatus, Len: 4096, Flags: CmdReqOne}), uint64(1<<20), uint8(7))
	f.Fuzz(func(t *testing.T, b []byte, size uint64, bits uint8) {
		if len(b) < RequestSize {
			return
		}
		r, ok := ParseRequest(b)
		if !ok {
			return
		}
		if !bytes.Equal(AppendRequest(nil, r), b[:RequestSize]) {
			t.Fatal("a request does not come out as it went in")
		}
		d := Door{Size: size, ReadOnly: bits&1 != 0, Structured: bits&2 != 0}
		if bits&6 == 6 {
			d.AllocID = contextAllocID
		}
		if d.Check(r) != status.OK || r.Type == CmdFlush || r.Type == CmdDisc {
			return
		}
		end := r.Off + uint64(r.Len)
		writes := r.Type == CmdWrite || r.Type == CmdTrim || r.Type == CmdWriteZeroes
		data := r.Type == CmdRead || r.Type == CmdWrite
		if r.Len == 0 || end < r.Off || end > size || (writes && d.ReadOnly) || (data && r.Len > MaxPayload) ||
			r.Type > CmdBlockStatus || (r.Type == CmdBlockStatus && d.AllocID == 0) || (r.Flags&CmdDF != 0 && !d.Structured) {
			t.Fatalf("%+v was let through by %+v", r, d)
		}
	})
}

// FuzzReply: a client's decoders neither panic nor ask for more than the
// limits.
func FuzzReply(f *testing.F) {
	f.Add(AppendSimple(nil, 1, 5))
	f.Add(AppendDataHead(nil, 1, 2, 3))
	f.Add(AppendError(nil, 1, 22, "why"))
	f.Add(AppendExtent(AppendStatusHead(nil, 1, 1, 1), Extent{Len: 1, State: 3}))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < 4 {
			return
		}
		n, err := ReplyHead(b)
		if err != nil || len(b) < n {
			return
		}
		c, err := ParseChunk(b[:n])
		if err != nil {
			return
		}
		if c.Len > MaxPayload+8 {
			t.Fatalf("a chunk of %d bytes was let through", c.Len)
		}
		rest := b[n:]
		if errno, text, err := ParseError(rest); err == nil && (errno == 0 || len(text) > len(rest)) {
			t.Fatalf("error %d %q", errno, text)
		}
		if _, xs, err := ParseExtents(rest); err == nil && len(xs) == 0 {
			t.Fatal("a block status without extents")
		}
		if _, _, err := ParseHole(rest); err == nil && len(rest) != 12 {
			t.Fatal("a hole of a wrong size")
		}
		var x Export
		if err := x.ReadInfo(rest); err == nil && len(rest) < 2 {
			t.Fatal("information without a type")
		}
	})
}

func TestErrorTextIsBounded(t *testing.T) {
	long := bytes.Repeat([]byte("ä"), MaxErrText)
	n := testNegotiation()
	n.Lookup = func(string) (Export, error) { return Export{}, status.Errorf(status.IO, "%s", long) }
	out, next := n.Option(OptGo, AppendInfoRequest(nil, "v"), nil)
	if kind, size, err := ParseReplyHeader(out, OptGo); err != nil || kind != RepErrPlatform || size > MaxErrText || next != NextOption {
		t.Errorf("reply %#x of %d bytes: %v", kind, size, err)
	}
	if b := AppendError(nil, 1, 5, string(long)); len(b) != StructuredSize+errorPrefixSize+MaxErrText {
		t.Errorf("a structured error of %d bytes", len(b))
	}
}

func TestKindsSurviveTheWire(t *testing.T) {
	for _, k := range []status.Kind{status.OK, status.Permission, status.Invalid, status.NoSpace, status.Unsupported, status.Shutdown, status.IO} {
		if got := KindOf(status.NBD(k)); got != k {
			t.Errorf("%v comes out as %v", k, got)
		}
	}
	if got := KindOf(status.NBD(status.Fenced)); got != status.Permission {
		t.Errorf("a fenced writer's client hears %v", got)
	}
}
