package check

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"time"

	"github.com/cairnstore/cairn/nbd/client"
	"github.com/cairnstore/cairn/proto/status"
)

// NBD returns a way to dial the export that uri names. tlsConf may be nil.
func NBD(uri string, tlsConf *tls.Config) func(context.Context) (Device, error) {
	return func(ctx context.Context) (Device, error) {
		c, err := client.Dial(ctx, uri, tlsConf)
		if err != nil {
			return nil, err
		}
		return nbdDevice{c}, nil
	}
}

// PatientNBD is NBD with a client that dials again by itself, for as long as
// wait: a lost connection is not to be seen.
func PatientNBD(uri string, wait time.Duration) func(context.Context) (Device, error) {
	return func(ctx context.Context) (Device, error) {
		p, err := client.DialPatient(ctx, uri, nil, wait)
		if err != nil {
			return nil, err
		}
		return nbdDevice{p}, nil
	}
}

var _ Device = nbdDevice{}

// nbdClient is a client.Client or a client.Patient.
type nbdClient interface {
	ReadAt(p []byte, off int64) (int, error)
	WriteAt(p []byte, off int64) (int, error)
	WriteFUA(p []byte, off int64) (int, error)
	Trim(off, n uint64) error
	WriteZeroes(off, n uint64, flags uint16) error
	Flush() error
	Close() error
}

// nbdDevice sorts the client's errors into lost connections and answers.
type nbdDevice struct{ c nbdClient }

func (d nbdDevice) ReadAt(p []byte, off int64) (int, error) {
	n, err := d.c.ReadAt(p, off)
	return n, sorted(err)
}

func (d nbdDevice) WriteAt(p []byte, off int64) (int, error) {
	n, err := d.c.WriteAt(p, off)
	return n, sorted(err)
}

func (d nbdDevice) WriteFUA(p []byte, off int64) error {
	_, err := d.c.WriteFUA(p, off)
	return sorted(err)
}

func (d nbdDevice) Trim(off, n int64) error { return sorted(d.c.Trim(uint64(off), uint64(n))) }

func (d nbdDevice) WriteZeroes(off, n int64) error {
	return sorted(d.c.WriteZeroes(uint64(off), uint64(n), 0))
}

func (d nbdDevice) Flush() error { return sorted(d.c.Flush()) }
func (d nbdDevice) Close() error { return sorted(d.c.Close()) }

// sorted marks the loss of a connection with ErrDisconnected. No answer of a
// server has the kinds Unknown and Unavailable. A connection given up because
// the server broke the protocol is no mere loss, and stays an error.
func sorted(err error) error {
	if k := status.Of(err); k != status.Unknown && k != status.Unavailable {
		return err
	}
	for _, broken := range []status.Kind{status.Invalid, status.Unsupported, status.IO, status.Corrupt} {
		if errors.Is(err, broken) {
			return err
		}
	}
	return fmt.Errorf("%w: %w", ErrDisconnected, err)
}
