package fault

import (
	"bytes"
	"io"
	"math/rand/v2"
	"net"
	"testing"
	"time"
)

// What goes through comes out whole and in order, not before its time, and Close
// leaves nothing.
func TestDelayKeepsBytesAndHoldsThemBack(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	echoed := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err == nil {
			_, err = io.Copy(c, c)
		}
		echoed <- err
	}()
	const delay = 20 * time.Millisecond
	d, err := NewDelay(l.Addr().String(), delay)
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("tcp", d.Addr())
	if err != nil {
		t.Fatal(err)
	}
	sent := make([]byte, 3<<20)
	for i := range sent {
		sent[i] = byte(rand.Uint32())
	}
	began := time.Now()
	go func() {
		if _, err := c.Write(sent); err != nil {
			t.Error(err)
		}
	}()
	got := make([]byte, len(sent))
	if _, err := io.ReadFull(c, got[:1]); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took < 2*delay { // a lower bound: no machine is too slow for it
		t.Errorf("a byte came back after %v, there and back is %v", took, 2*delay)
	}
	if _, err := io.ReadFull(c, got[1:]); err != nil || !bytes.Equal(got, sent) {
		t.Errorf("other bytes came back: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if _, err := c.Read(got); err == nil {
		t.Error("the connection lives on")
	}
	<-echoed
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}
