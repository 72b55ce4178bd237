package wire

import (
	"bytes"
	"reflect"
	"testing"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
)

func sampleRequest() *Request {
	return &Request{Kind: Write, ID: 7, Store: ids.NewStoreID(), Volume: 1, Chunk: 2, Layer: 3, Epoch: 4, Block: 5,
		Count: 2, Version: ids.MakeVersion(4, 9), Floor: ids.MakeVersion(4, 1), Limit: 8,
		Sums: []uint32{1, 2}, Entries: []Entry{{Chunk: 1, Version: 2, Layer: 3, Block: 4, Sum: 5, Kind: EntryZero}},
		Data: make([]byte, 2*ids.BlockSize)}
}

func TestFramesSurviveTheWire(t *testing.T) {
	q := sampleRequest()
	b := AppendRequest(nil, q)
	h, err := ParseHeader(b)
	if err != nil {
		t.Fatal(err)
	}
	got, err := DecodeRequest(h, b[HeaderBytes:])
	if err != nil {
		t.Fatal(err)
	}
	got.Data = q.Data
	if !reflect.DeepEqual(got, q) {
		t.Fatalf("got %+v\nwant %+v", got, q)
	}
	r := &Reply{Kind: Read, Flags: FlagReply | FlagMore, Status: status.Corrupt, ID: 9, Epoch: 1, Block: 2, Count64: 3, Version: 4,
		Floor: 5, Incarnation: 6, Took: 7, Digests: []uint64{1, 2, 3}, Entries: q.Entries, Detail: "bad block"}
	b = AppendReply(nil, r)
	if h, err = ParseHeader(b); err != nil {
		t.Fatal(err)
	}
	back, err := DecodeReply(h, b[HeaderBytes:])
	if err != nil || !reflect.DeepEqual(back, r) {
		t.Fatalf("got %+v, %v\nwant %+v", back, err, r)
	}
}

// Every single flipped bit of a frame's header and body must be noticed.
func TestEveryFlippedBitIsNoticed(t *testing.T) {
	frame := AppendRequest(nil, sampleRequest())
	for bit := range len(frame) * 8 {
		b := append([]byte(nil), frame...)
		b[bit/8] ^= 1 << (bit % 8)
		h, err := ParseHeader(b)
		if err != nil {
			continue
		}
		if _, err := DecodeRequest(h, b[HeaderBytes:]); err == nil {
			t.Fatalf("bit %d flipped unnoticed", bit)
		}
	}
}

// A block's state that is no byte is refused, not cut to one.
func TestStatesAreBytes(t *testing.T) {
	for at := range 4 {
		q := &Request{Kind: Install, Entries: []Entry{{Chunk: 1, Kind: EntryPoison}}}
		b := AppendRequest(nil, q)
		b[HeaderBytes+requestFixed+28+at] = 2
		le.PutUint32(b[24:], Checksum(b[HeaderBytes:]))
		le.PutUint32(b[28:], Checksum(b[:28]))
		h, err := ParseHeader(b)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := DecodeRequest(h, b[HeaderBytes:]); (err == nil) != (at == 0) {
			t.Errorf("byte %d of a state set: %+v, %v", at, got, err)
		}
	}
}

// FuzzDecode: whatever a frame holds, its checksums being no obstacle, it is
// refused with a kind, or what was understood goes out as the same bytes.
func FuzzDecode(f *testing.F) {
	f.Add(AppendRequest(nil, sampleRequest()))
	f.Add(AppendReply(nil, &Reply{Kind: Read, Detail: "x", Digests: []uint64{1}}))
	f.Add(AppendRequest(nil, &Request{Kind: Read, Count: 1, Layer: 9, Chain: []ids.LayerID{7, 3}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := ParseHeader(b); err == nil && len(b) < HeaderBytes {
			t.Fatal("a header of too few bytes")
		}
		if len(b) < HeaderBytes {
			return
		}
		b = bytes.Clone(b)
		le.PutUint32(b, magic)
		b[4] = Version
		body := b[HeaderBytes:]
		if n := le.Uint32(b[16:]); n <= uint32(len(body)) {
			body = body[:n]
			le.PutUint32(b[24:], Checksum(body))
		}
		le.PutUint32(b[28:], Checksum(b[:28]))
		h, err := ParseHeader(b)
		if err != nil {
			if status.Of(err) != status.TooBig {
				t.Fatal(err)
			}
			return
		}
		q, err := DecodeRequest(h, body)
		if err == nil {
			q.Data = make([]byte, h.DataLen)
			if again := AppendRequest(nil, q); !bytes.Equal(again, b[:HeaderBytes+h.BodyLen]) {
				t.Fatalf("%+v goes out as other bytes than it came in", q)
			}
		}
		if k := status.Of(err); err != nil && k != status.Invalid && k != status.Unsupported && k != status.Corrupt {
			t.Fatalf("a request's error without a kind: %v", err)
		}
		r, err := DecodeReply(h, body)
		if err == nil {
			r.Data = make([]byte, h.DataLen)
			again, err := ParseHeader(AppendReply(nil, r))
			if err != nil || again.BodyLen != h.BodyLen || again.DataLen != h.DataLen {
				t.Fatalf("%+v goes out as %+v, %v", r, again, err)
			}
		}
		if k := status.Of(err); err != nil && k != status.Invalid && k != status.Corrupt {
			t.Fatalf("a reply's error without a kind: %v", err)
		}
	})
}

func TestBlockSumCoversIdentity(t *testing.T) {
	data := make([]byte, ids.BlockSize)
	seen := map[uint32]int{}
	for i, s := range []uint32{BlockSum(1, 1, 1, 1, 1, data), BlockSum(2, 1, 1, 1, 1, data), BlockSum(1, 2, 1, 1, 1, data),
		BlockSum(1, 1, 2, 1, 1, data), BlockSum(1, 1, 1, 2, 1, data), BlockSum(1, 1, 1, 1, 2, data)} {
		if j, ok := seen[s]; ok {
			t.Fatalf("identities %d and %d have the same sum", i, j)
		}
		seen[s] = i
	}
}

func TestAChainTravelsWithARead(t *testing.T) {
	q := &Request{Kind: Read, ID: 3, Volume: 1, Chunk: 2, Layer: 9, Count: 1, Chain: []ids.LayerID{7, 3, 0}}
	decode := func() (*Request, error) {
		b := AppendRequest(nil, q)
		h, err := ParseHeader(b)
		if err != nil {
			t.Fatal(err)
		}
		return DecodeRequest(h, b[HeaderBytes:])
	}
	if got, err := decode(); err != nil || !reflect.DeepEqual(got, q) {
		t.Fatalf("got %+v, %v\nwant %+v", got, err, q)
	}
	for _, bad := range [][]ids.LayerID{{9}, {7, 7}, {3, 7}, make([]ids.LayerID, MaxLayers)} {
		q.Chain = bad
		if got, err := decode(); status.Of(err) != status.Invalid {
			t.Fatalf("chain %v: %+v, %v", bad, got, err)
		}
	}
	q.Kind, q.Chain, q.Count = Flush, []ids.LayerID{3}, 0
	if got, err := decode(); status.Of(err) != status.Invalid {
		t.Fatalf("a flush with a chain: %+v, %v", got, err)
	}
}
