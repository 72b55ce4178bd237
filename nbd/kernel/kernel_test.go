package kernel

import (
	"errors"
	"maps"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/proto/status"
)

// bytesOf is a message's attributes as they are sent.
func (m *message) bytesOf() []byte {
	var b []byte
	for _, a := range m.attrs {
		b = append(b, a.Serialize()...)
	}
	return b
}

func TestMessageReadsBack(t *testing.T) {
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}()
	m := message{}
	m.u32(attrIndex, 7)
	m.u64(attrSize, 1<<40)
	m.seconds(attrTimeout, 30*time.Second)
	m.sockets([]*os.File{f, f})
	m.identifier("nbd://h/v")
	as, err := parse(m.bytesOf())
	if err != nil || len(as) != 5 {
		t.Fatalf("%v, %v", as, err)
	}
	if b, ok := find(as, attrTimeout, 8); !ok || native.Uint64(b) != 30 {
		t.Errorf("timeout % x", b)
	}
	if b, ok := find(as, attrIdentifier, 1); !ok || string(b) != "nbd://h/v\x00" {
		t.Errorf("identifier %q", b)
	}
	list, _ := find(as, attrSockets, 1)
	items, err := parse(list)
	if err != nil || len(items) != 2 {
		t.Fatalf("sockets %v, %v", items, err)
	}
	for _, item := range items {
		fields, err := parse(item.data)
		if err != nil || item.kind != itemAttr {
			t.Fatal(item, err)
		}
		if b, ok := find(fields, sockFD, 4); !ok || native.Uint32(b) != uint32(f.Fd()) {
			t.Errorf("socket % x", b)
		}
	}
}

func TestParseStatus(t *testing.T) {
	list := nl.NewRtAttr(attrDevices, nil)
	for i, up := range []uint8{1, 0} {
		item := list.AddRtAttr(itemAttr|unix.NLA_F_NESTED, nil)
		item.AddRtAttr(devIndex, nl.Uint32Attr(uint32(i*5)))
		item.AddRtAttr(devConnected, nl.Uint8Attr(up))
	}
	as, err := parse(list.Serialize())
	if err != nil {
		t.Fatal(err)
	}
	got, err := parseStatus(as)
	if err != nil || !maps.Equal(got, map[int]bool{0: true, 5: false}) {
		t.Errorf("%v, %v", got, err)
	}
	if got, err := parseStatus(nil); err != nil || len(got) != 0 {
		t.Errorf("no device: %v, %v", got, err)
	}
}

// FuzzParse: nothing the kernel might say panics.
func FuzzParse(f *testing.F) {
	f.Add([]byte{8, 0, 1, 0, 7, 0, 0, 0})
	f.Add([]byte{0, 0, 1, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		as, err := parse(b)
		if err == nil {
			if _, err := parseStatus(as); err != nil && status.Of(err) != status.Internal {
				t.Error(err)
			}
		}
		parseDead(b)
	})
}

func TestLimits(t *testing.T) {
	for _, c := range []Config{{Connections: -1}, {Connections: 17}, {Timeout: time.Second}, {DeadTimeout: time.Millisecond}} {
		if err := c.defaults(); !errors.Is(err, status.Invalid) {
			t.Errorf("%+v: %v", c, err)
		}
	}
	for s, want := range map[string]int{"/dev/nbd0": 0, "nbd12": 12, "3": 3} {
		if got, err := ParseDevice(s); err != nil || got != want {
			t.Errorf("%q: %d, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "/dev/sda", "nbd-1", "/dev/nbd0p1"} {
		if _, err := ParseDevice(s); !errors.Is(err, status.Invalid) {
			t.Errorf("%q: %v", s, err)
		}
	}
	if blockSize(8192) != 4096 || blockSize(8704) != 512 {
		t.Error("block sizes")
	}
}

// TestKernelWithoutNBD: on such a kernel nothing is attached, and attaching
// says what is missing. The guest's test covers kernels that have it.
func TestKernelWithoutNBD(t *testing.T) {
	if _, err := netlink.GenlFamilyGet(familyName); err == nil {
		return // it has
	}
	if ds, err := Devices(); err != nil || len(ds) != 0 {
		t.Errorf("%v, %v", ds, err)
	}
	if _, err := family(); err != nil && !errors.Is(err, status.Unsupported) {
		t.Error(err)
	}
}
