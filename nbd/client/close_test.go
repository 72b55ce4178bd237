package client

import (
	"errors"
	"net"
	"testing"
)

// stubborn is a connection whose closing fails.
type stubborn struct{ net.Conn }

var errStubborn = errors.New("not closed")

func (stubborn) Close() error { return errStubborn }

// Whoever closes a connection that another one has closed already hears how that
// went: one of the two may not be listening.
func TestClosingAgainSaysTheSame(t *testing.T) {
	c := &Client{nc: stubborn{}}
	for range 2 {
		if err := c.hangUp(); !errors.Is(err, errStubborn) {
			t.Errorf("closing says %v", err)
		}
	}
}
