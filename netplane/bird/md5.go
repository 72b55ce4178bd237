package bird

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/proto/status"
)

// checkMD5 refuses keys of BGP where the kernel cannot sign TCP segments: BIRD
// would start, and its sessions never come up.
func (t Topology) checkMD5(node string) error {
	if t.Protocol != BGP {
		return nil
	}
	for i, c := range t.Cables {
		if c.Key == "" || c.Host != node && c.Spine != node {
			continue
		}
		if ok, err := canMD5(); err != nil {
			return err
		} else if !ok {
			return status.Errorf(status.Unsupported, "cable[%d].key: this kernel has no TCP MD5 signatures (CONFIG_TCP_MD5SIG), which BGP's keys need: leave the keys out, or use ospf or rip", i)
		}
		return nil
	}
	return nil
}

// canMD5 asks the kernel by giving a socket a key.
func canMD5() (ok bool, err error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false, fmt.Errorf("open a socket: %w", err)
	}
	defer func() { err = errors.Join(err, unix.Close(fd)) }()
	sig := unix.TCPMD5Sig{Keylen: 1}
	sig.Addr.Family = unix.AF_INET
	sig.Key[0] = 'k'
	switch serr := unix.SetsockoptTCPMD5Sig(fd, unix.IPPROTO_TCP, unix.TCP_MD5SIG, &sig); {
	case serr == nil:
		return true, nil
	case errors.Is(serr, unix.ENOPROTOOPT), errors.Is(serr, unix.EOPNOTSUPP):
		return false, nil
	default:
		return false, fmt.Errorf("give a socket a key: %w", serr)
	}
}
