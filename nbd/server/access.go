package server

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"os"
	"sync"
	"time"

	"github.com/cairnstore/cairn/proto/status"
)

// Access is what a client may do with an export.
type Access uint8

// The degrees of access.
const (
	AccessNone Access = iota
	AccessRead
	AccessFull
)

// Identity is who a client has proved to be.
type Identity struct {
	Local bool     // over a unix socket: its mode and owner have decided who gets so far
	Names []string // of a verified client certificate: common name, then DNS, URI and mail names
}

// identify says who is at the other end of a connection.
func identify(nc net.Conn) Identity {
	tc, ok := nc.(*tls.Conn)
	if !ok {
		_, local := nc.LocalAddr().(*net.UnixAddr)
		return Identity{Local: local}
	}
	who := identify(tc.NetConn())
	if chains := tc.ConnectionState().VerifiedChains; len(chains) > 0 {
		who.Names = certificateNames(chains[0][0])
	}
	return who
}

func certificateNames(c *x509.Certificate) []string {
	var names []string
	if c.Subject.CommonName != "" {
		names = append(names, c.Subject.CommonName)
	}
	names = append(names, c.DNSNames...)
	for _, u := range c.URIs {
		names = append(names, u.String())
	}
	return append(names, c.EmailAddresses...)
}

// Files name the PEM files of a TLS server that knows its clients by their
// certificates.
type Files struct {
	Cert, Key string // the server's own certificate, its chain, and its key
	CA        string // authorities whose client certificates are believed
}

// LoadTLS reads f and returns a configuration that demands a client
// certificate. Files that change later are read again at the next handshake;
// while new ones cannot be used, the old ones serve on.
func LoadTLS(f Files) (*tls.Config, error) {
	l := &loader{files: f}
	conf, err := l.load()
	if err != nil {
		return nil, err
	}
	l.conf, l.stamp = conf, l.stamps()
	outer := conf.Clone()
	outer.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) { return l.current(), nil }
	return outer, nil
}

type loader struct {
	files Files

	mu    sync.Mutex // guards what follows
	conf  *tls.Config
	stamp [3]time.Time // modification times when conf was read, or last tried
}

func (l *loader) load() (*tls.Config, error) {
	cert, err := tls.LoadX509KeyPair(l.files.Cert, l.files.Key)
	if err != nil {
		return nil, status.Errorf(status.Invalid, "the TLS certificate %s with key %s cannot be used: %w", l.files.Cert, l.files.Key, err)
	}
	pem, err := os.ReadFile(l.files.CA)
	if err != nil {
		return nil, status.Errorf(status.Invalid, "the authorities of TLS clients cannot be read: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, status.Errorf(status.Invalid, "%s holds no certificate of an authority", l.files.CA)
	}
	return &tls.Config{Certificates: []tls.Certificate{cert}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert, MinVersion: tls.VersionTLS12}, nil
}

// stamps are the files' modification times; one that is gone has none.
func (l *loader) stamps() (out [3]time.Time) {
	for i, path := range []string{l.files.Cert, l.files.Key, l.files.CA} {
		fi, err := os.Stat(path)
		if err == nil {
			out[i] = fi.ModTime()
		} else if !errors.Is(err, os.ErrNotExist) {
			out[i] = time.Unix(0, 0)
		}
	}
	return out
}

// current is the configuration of the files as they are now.
func (l *loader) current() *tls.Config {
	l.mu.Lock()
	defer l.mu.Unlock()
	if now := l.stamps(); now != l.stamp {
		if conf, err := l.load(); err == nil {
			l.conf, l.stamp = conf, now
		} // else: half-way through a change, and looked at again next time
	}
	return l.conf
}
